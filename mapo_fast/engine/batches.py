"""Which pairs train when: micro-batches as a pure function of (seed, position).

Every micro-batch holds pairs of one aspect bucket. Within an epoch each pair comes exactly once: the pairs
of a bucket are shuffled and cut into micro-batches (the last one may be smaller), then all micro-batches are
shuffled. Resume needs no state but the position, and no order is stored: memory and start do not grow with
the number of pairs.

Single images (Diffusion-KTO) take the place of pairs two by two, in any mix of labels. Where a bucket has an
odd number of images, one of them comes twice, another one in each epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from mapo_fast.data.cache import CachedPair
from mapo_fast.engine.draws import EpochOrder


class _Bucket(NamedTuple):
    """Pairs [start, stop) are of one bucket."""

    name: tuple[int, int]
    start: int
    stop: int


class MicroBatches:
    """An endless sequence of micro-batches over `pairs`.

    Args:
        pairs: the training pairs, sorted by bucket as a cache has them.
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
        self._buckets = _buckets(pairs)
        counts = [-(-(b.stop - b.start) // self._size) for b in self._buckets]
        self._first = [0, *accumulate(counts)]
        """Number of each bucket's first micro-batch, before the shuffle of all."""
        self.per_epoch = self._first[-1]

    def at(self, position: int) -> tuple[int, list[CachedPair]]:
        """Epoch and pairs of the micro-batch at a position counted from the start of training."""
        epoch, index = divmod(position, self.per_epoch)
        number = EpochOrder(self.seed, epoch, "batches", self.per_epoch)[index]
        which = bisect_right(self._first, number) - 1
        name, start, stop = self._buckets[which]
        order = EpochOrder(self.seed, epoch, f"bucket {name}", stop - start)
        begin = (number - self._first[which]) * self._size
        end = min(begin + self._size, stop - start)
        places = list(range(begin, end)) + [0] * ((end - begin) % 2 if not self._paired else 0)
        return epoch, [self.pairs[start + order[i]] for i in places]


def most_frequent(pairs: Sequence[CachedPair]) -> tuple[int, int] | None:
    """Height and width of the bucket with the most pairs (they are sorted by bucket); None without pairs."""
    largest = max(_buckets(pairs), key=lambda bucket: bucket.stop - bucket.start, default=None)
    return None if largest is None else largest.name


def _buckets(pairs: Sequence[CachedPair]) -> list[_Bucket]:
    """The ranges of equal buckets, found by bisection: data sets may have millions of pairs."""
    found: list[_Bucket] = []
    while (start := found[-1].stop if found else 0) < len(pairs):
        name = pairs[start].bucket
        stop = bisect_right(range(len(pairs)), name, lo=start, key=lambda i: pairs[i].bucket)
        found.append(_Bucket(name, start, stop))
    return found
