"""Memory that torch's allocator reserves for a traced run: its steps replayed by the allocator's rules.

Tensors are not all. Blocks that lie where nothing else fits, what is left of segments, and the workspaces
that torch makes for cuBLAS are reserved too. How much that is follows from the order in which a step
allocates and frees, so every plan has its own share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from mapo_fast.hardware.allocator import MIB, Block, CachingAllocator, CapReachedError, Rules
from mapo_fast.planner.trace import Trace

EXACT = 1 / 256
"""Tolerance of the search for the least cap, as a share of the peak."""
_HANDLES = 2
"""Number of cuBLAS handles: the thread of forward passes has one, and autograd's."""


class Allocator(NamedTuple):
    """torch's allocator on a card."""

    rules: Rules
    workspace: int
    """Bytes that each cuBLAS handle holds for a stream."""
    graphs: bool = False
    """Whether steps run as CUDA graphs."""


def cublas_workspace(capability: int) -> int:
    """Bytes of one of torch's workspaces for cuBLAS (`CublasHandlePool.cpp`).

    Args:
        capability: of the card, 89 for 8.9.
    """
    chosen = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if chosen:
        return sum(1024 * int(size) * int(count) for size, count in chosen)
    return 32 * MIB if capability >= 90 else 1024 * (2 * 4096 + 8 * 16)


def reserved(trace: Trace, allocator: Allocator, cap: int | None = None) -> int:
    """Most bytes that are reserved in a run of these steps.

    A run loads, takes its first step and goes on with the last one that was traced. With CUDA graphs that
    one is captured in a pool of its own, and something as large runs outside of it.

    Raises:
        CapReachedError: the steps need more than the cap.
    """
    caching = CachingAllocator(allocator.rules, cap)
    sizes, events = trace.sizes.tolist(), trace.events.tolist()
    live: dict[int, Block] = {}

    def run(happened: Iterable[int], *, private: bool = False) -> None:
        for event in happened:
            if event < 0:
                block = live.pop(~event, None)
                if block is not None:
                    caching.free(block)
            elif event not in live:  # what lasts is there since the step before
                live[event] = caching.malloc(sizes[event], private=private)

    first, last = trace.begins[0], trace.begins[-1]
    run(events[:first])
    for _ in range(_HANDLES * (2 if allocator.graphs else 1)):  # one for each stream too
        caching.malloc(allocator.workspace)
    run(events[first:])
    if allocator.graphs:
        caching.release()
        run(events[last:], private=True)
    run(events[last:])
    return caching.peak


class Replays:
    """Replays of traces; each one is computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Allocator, int | None], tuple[Trace, int | None]] = {}

    def reserved(self, trace: Trace, allocator: Allocator, cap: int | None = None) -> int | None:
        """Bytes that the steps reserve, see `reserved`; None where they need more than the cap."""
        key = id(trace), allocator, cap
        if key not in self._known:
            found = None
            with suppress(CapReachedError):
                found = reserved(trace, allocator, cap)
            self._known[key] = trace, found  # a trace that is kept keeps its id
        return self._known[key][1]

    def least(self, trace: Trace, allocator: Allocator) -> int:
        """The least cap under which the steps run; with expandable segments their bytes without a cap."""
        enough = self._uncapped(trace, allocator)
        if allocator.rules.expandable:
            return enough
        short = trace.peak
        while enough - short > EXACT * trace.peak:
            middle = (short + enough) // 2
            if self.reserved(trace, allocator, middle) is not None:
                enough = middle
            else:
                short = middle
        return enough

    def needed(self, trace: Trace, allocator: Allocator, room: int) -> int:
        """Bytes that the steps reserve under a cap of `room`, or the least cap under which they run.

        A result above `room` means that they do not run under it.
        """
        most = self._uncapped(trace, allocator)
        if most <= room:
            return most
        if self.reserved(trace, allocator, room) is not None:
            return room
        return max(room + 1, self.least(trace, allocator))

    def _uncapped(self, trace: Trace, allocator: Allocator) -> int:
        found = self.reserved(trace, allocator)
        assert found is not None
        return found
