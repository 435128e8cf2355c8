"""Reading ahead: the same micro-batches in the same order, one in the making, and no thread left over."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from mapo_fast.engine.prefetch import MicroBatch, Prefetch
from mapo_fast.util.errors import UserError
from tests.engine.pair_steps import pair_of_inputs

CPU = torch.device("cpu")


class Source:
    """Micro-batches told apart by their share; says how many it has made, and in which thread."""

    def __init__(self, count: int, *, failing: int | None = None) -> None:
        self.count, self.failing = count, failing
        self.made = 0
        self.threads: set[int] = set()
        self.progress = threading.Condition()

    def __iter__(self) -> Iterator[MicroBatch]:
        inputs = pair_of_inputs(1)
        for number in range(self.count):
            if number == self.failing:
                raise UserError("shard damaged")
            self.threads.add(threading.get_ident())
            with self.progress:
                self.made += 1
                self.progress.notify_all()
            yield MicroBatch(inputs, float(number))

    def wait_for(self, count: int) -> None:
        with self.progress:
            assert self.progress.wait_for(lambda: self.made >= count, timeout=30)


def prefetch_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_everything_comes_once_and_in_order() -> None:
    source = Source(5)
    with Prefetch(iter(source), CPU) as ahead:
        assert [item.share for item in ahead] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert source.threads
    assert threading.get_ident() not in source.threads
    assert not prefetch_threads()


def test_one_item_is_made_ahead_and_no_more() -> None:
    source = Source(9)
    with Prefetch(iter(source), CPU) as ahead:
        source.wait_for(1)
        assert next(ahead).share == 0.0
        source.wait_for(2)
        assert not threading.Event().wait(0.05)  # time to do wrong
        assert source.made == 2


def test_an_error_comes_where_its_item_would_have() -> None:
    with Prefetch(iter(Source(5, failing=2)), CPU) as ahead:
        assert [next(ahead).share, next(ahead).share] == [0.0, 1.0]
        with pytest.raises(UserError, match="shard damaged"):
            next(ahead)
    assert not prefetch_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_no_thread_is_left_when_the_step_fails(error: type[BaseException]) -> None:
    def step() -> None:
        with Prefetch(iter(Source(5)), CPU) as ahead:
            next(ahead)
            raise error

    with pytest.raises(error):
        step()
    assert not prefetch_threads()
