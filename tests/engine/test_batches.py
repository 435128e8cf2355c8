"""Micro-batches: every pair once an epoch, one bucket each, a function of the position."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from mapo_fast.engine.batches import MicroBatches, most_frequent


@dataclass(frozen=True)
class Pair:
    id: str
    bucket: tuple[int, int]


PAIRS = [Pair(str(i), (64, 64) if i > 16 else (32, 96)) for i in range(50)]


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_every_pair_comes_once_an_epoch_and_buckets_are_not_mixed(size: int) -> None:
    batches = MicroBatches(PAIRS, size, seed=0)  # type: ignore[arg-type]
    for epoch in range(3):
        seen: Counter[str] = Counter()
        for index in range(batches.per_epoch):
            found, pairs = batches.at(epoch * batches.per_epoch + index)
            assert found == epoch
            assert 1 <= len(pairs) <= size
            assert len({p.bucket for p in pairs}) == 1
            seen.update(p.id for p in pairs)
        assert seen == Counter(p.id for p in PAIRS)


def test_a_position_needs_no_history() -> None:
    walked = MicroBatches(PAIRS, 4, seed=5)  # type: ignore[arg-type]
    for position in range(40):
        expected = walked.at(position)
        assert MicroBatches(PAIRS, 4, seed=5).at(position) == expected  # type: ignore[arg-type]


def test_epochs_and_seeds_differ() -> None:
    batches = MicroBatches(PAIRS, 4, seed=0)  # type: ignore[arg-type]
    first = [batches.at(i)[1] for i in range(batches.per_epoch)]
    second = [batches.at(batches.per_epoch + i)[1] for i in range(batches.per_epoch)]
    other = MicroBatches(PAIRS, 4, seed=1)  # type: ignore[arg-type]
    assert first != second
    assert first != [other.at(i)[1] for i in range(batches.per_epoch)]


def test_the_most_frequent_bucket() -> None:
    assert most_frequent(PAIRS) == (64, 64)  # type: ignore[arg-type]
    assert most_frequent(PAIRS[:20]) == (32, 96)  # type: ignore[arg-type]
    assert most_frequent([]) is None
