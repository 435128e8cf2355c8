"""The next micro-batch is made while the current step runs.

A thread reads the shards, draws the noise and copies from pinned memory, on a stream of its own. Every draw
is a function of (seed, epoch, pair id), so what comes out has the same bits at any time and in any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from mapo_fast.engine.step import PairInputs


class MicroBatch(NamedTuple):
    """Arguments of `Engine.accumulate`."""

    inputs: PairInputs
    share: float
    """The micro-batch's fraction of its optimizer step's pairs."""
    reference_errors: Tensor | None = None
    labels: Tensor | None = None


class Prefetch(Iterator[MicroBatch]):
    """The items of an iterator, the next one in the making. Use it as a context manager.

    An exception of the iterator is raised in place of its item. The device holds one item more than the one
    that was given out last.

    Args:
        source: makes the items; used by one thread at a time.
        device: where the items are.
    """

    def __init__(self, source: Iterator[MicroBatch], device: torch.device) -> None:
        self._source, self._device = source, device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: Future[tuple[MicroBatch | None, torch.cuda.Event | None]] = self._thread.submit(
            self._make
        )

    def __enter__(self) -> Prefetch:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the item in the making and drop it."""
        self._thread.shutdown(cancel_futures=True)

    def __next__(self) -> MicroBatch:
        """The next item, in order with what the current stream is given from now on."""
        item, event = self._next.result()
        if item is None:
            raise StopIteration
        self._next = self._thread.submit(self._make)
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for tensor in (*item.inputs, item.reference_errors, item.labels):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory is the other stream's
        return item

    def _make(self) -> tuple[MicroBatch | None, torch.cuda.Event | None]:
        if self._stream is None:
            return next(self._source, None), None
        with torch.cuda.stream(self._stream):
            return next(self._source, None), self._stream.record_event()


def read_ahead(
    source: Iterator[MicroBatch], device: torch.device, *, prefetch: bool
) -> AbstractContextManager[Iterator[MicroBatch]]:
    """The items of an iterator, by `Prefetch` if that is wanted."""
    return Prefetch(source, device) if prefetch else nullcontext(source)
