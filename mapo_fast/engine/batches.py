"""Which pairs train when: micro-batches as a pure function of (seed, position).

Every micro-batch holds pairs of one aspect bucket. Within an epoch each pair comes exactly once: the pairs
of a bucket are shuffled and cut into micro-batches (the last one may be smaller), then all micro-batches are
shuffled. Resume needs no state but the position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mapo_fast.data.cache import CachedPair
from mapo_fast.draws import epoch_order


class MicroBatches:
    """An endless sequence of micro-batches over `pairs`.

    Args:
        pairs: the training pairs; their order does not matter beyond identity.
        pairs_per_batch: pairs per micro-batch.
        seed: seed of all shuffles.
    """

    def __init__(self, pairs: Sequence[CachedPair], pairs_per_batch: int, seed: int) -> None:
        self.pairs, self.pairs_per_batch, self.seed = pairs, pairs_per_batch, seed
        self.buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, pair in enumerate(pairs):
            self.buckets[pair.bucket].append(index)
        self.per_epoch = sum(-(-len(members) // pairs_per_batch) for members in self.buckets.values())
        self._planned: tuple[int, list[list[int]]] = (-1, [])

    def at(self, position: int) -> tuple[int, list[CachedPair]]:
        """Epoch and pairs of the micro-batch at a position counted from the start of training."""
        epoch, index = divmod(position, self.per_epoch)
        planned, order = self._planned  # read once: another thread may be in another epoch
        if planned != epoch:
            order = self._plan(epoch)
            self._planned = epoch, order
        return epoch, [self.pairs[i] for i in order[index]]

    def _plan(self, epoch: int) -> list[list[int]]:
        batches = []
        for bucket, members in sorted(self.buckets.items()):
            order = epoch_order(self.seed, epoch, f"bucket {bucket}", len(members))
            shuffled = [members[i] for i in order]
            size = self.pairs_per_batch
            batches += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        return [batches[i] for i in epoch_order(self.seed, epoch, "batches", len(batches))]
