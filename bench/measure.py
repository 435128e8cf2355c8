"""Time and memory of one call.

Device time is that of a CUDA graph, replayed: no launch overhead, no Python. The graph makes the call on many
sets of inputs, together several times as large as the L2 cache, so that each call finds the cache cold. Wall
time is that of the plain call from Python, which is what an eager training step pays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]

REPLAYS = 30
"""Measurements of which quantiles are taken."""
LEAST_MS = 3.0
"""Least duration of a replay, reached by calling several times, so that its start does not count."""
FLUSH = 4
"""Size of a graph's inputs, in multiples of the L2 cache."""
MOST_SETS = 200


class Times(NamedTuple):
    """Quantiles in milliseconds."""

    p20: float
    p50: float
    p80: float


def quantiles(milliseconds: Sequence[float]) -> Times:
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return Times(*(ordered[round(last * share)] for share in (0.2, 0.5, 0.8)))


def input_sets(bytes_per_call: int) -> int:
    """Sets of inputs that make each call find a cold L2 cache."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(1, min(MOST_SETS, -(-FLUSH * cache // max(1, bytes_per_call))))


def on_side_stream(work: Callable[[], Any]) -> Any:
    """Run on a stream that can be captured later: backward runs on forward's stream."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return result


_streams: list[torch.cuda.Stream] = []


def _stream() -> torch.cuda.Stream:
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


def device_times(calls: Sequence[Call]) -> Times:
    """Milliseconds of one call on the GPU: the time of all calls as one graph, divided by their number.

    Results of a call are freed before the next one is recorded, as in training.
    """
    for call in calls[:3]:  # compiles, allocates workspaces
        on_side_stream(call)
    torch.cuda.synchronize()
    once = wall_times(calls[:3], repeats=3).p50
    rounds = max(1, min(50, round(LEAST_MS / (once * len(calls) + 1e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    each = rounds * len(calls)
    return quantiles([start.elapsed_time(end) / each for start, end in events])


def event_times(calls: Sequence[Call]) -> Times:
    """Milliseconds of one call between events on the GPU, where it cannot be captured: with launch gaps."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return quantiles([start.elapsed_time(end) for start, end in events])


def wall_times(calls: Sequence[Call], repeats: int = REPLAYS) -> Times:
    """Milliseconds from a call's start until the device has finished it, calls one after another."""
    found = []
    for _ in range(repeats):
        _finish()
        start = time.perf_counter()
        for call in calls:
            call()
        _finish()
        found.append(1e3 * (time.perf_counter() - start) / len(calls))
    return quantiles(found)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def launches(call: Call) -> int:
    """Kernels and memory operations that one call puts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_bytes(call: Call) -> int:
    """Peak bytes that a call allocates, on top of those allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Call, besides: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, without those of `besides`.

    Works on fake tensors too.
    """
    kept: dict[int, int] = {}
    known = {x.untyped_storage()._cdata for x in besides}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()  # kept alive: else storages are freed and their addresses used again
    del result
    return sum(kept.values())


def copy_gbps(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes read and written per second by a plain copy of a large tensor, in GB/s."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = device_times([lambda: target.copy_(source)]).p50
    return 2 * nbytes / milliseconds / 1e6
