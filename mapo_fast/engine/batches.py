"""Which pairs train when: micro-batches as a pure function of (seed, position).

Every micro-batch holds pairs of one aspect bucket. Within an epoch each pair comes exactly once: the pairs
of a bucket are shuffled and cut into micro-batches (the last one may be smaller), then all micro-batches are
shuffled. Resume needs no state but the position.

Single images (Diffusion-KTO) come two for a pair, in any mix of labels. Where a bucket has an odd number of
them, one, another one in each epoch, comes twice.
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
        paired: False: `pairs` are single images.
    """

    def __init__(
        self, pairs: Sequence[CachedPair], pairs_per_batch: int, seed: int, *, paired: bool = True
    ) -> None:
        self.pairs, self.pairs_per_batch, self.seed = pairs, pairs_per_batch, seed
        self._paired = paired
        self._size = pairs_per_batch if paired else 2 * pairs_per_batch
        self.buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, pair in enumerate(pairs):
            self.buckets[pair.bucket].append(index)
        self.per_epoch = sum(-(-len(members) // self._size) for members in self.buckets.values())
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
            if not self._paired and len(shuffled) % 2:
                shuffled.append(shuffled[0])
            batches += [shuffled[i : i + self._size] for i in range(0, len(shuffled), self._size)]
        return [batches[i] for i in epoch_order(self.seed, epoch, "batches", len(batches))]
