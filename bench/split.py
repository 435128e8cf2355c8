"""How the time of a step is spent: by phase, and how long the GPU is idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

UPDATES = ("_advance_kernel", "_update_kernel", "_squares_kernel", "_clip_kernel")
"""AdamW8bit's kernels."""
Phases = dict[str, float]
"""Milliseconds of `data`, `forward`, `backward` and `step`. `backward` is the rest after forward and update:
it includes the loss, and an update that is fused into it."""


class Split:
    """Marks in a step: events on the GPU, clock readings on the CPU.

    Args:
        device: where the step runs.
        forwards: modules whose calls are the forward pass.
    """

    def __init__(self, device: torch.device, forwards: Iterable[torch.nn.Module]) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        for module in forwards:
            module.register_forward_pre_hook(lambda *_: self.mark("forward"))
            module.register_forward_hook(lambda *_: self.mark("backward"))

    def mark(self, phase: str) -> None:
        """Begin a phase and end the one before; phases within a graph cannot be told apart."""
        if self._gpu and torch.cuda.is_current_stream_capturing():
            return
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def take(self) -> Phases:
        """Milliseconds by phase since the last call, which waits for the device."""
        marks, self._marks = self._marks, []
        if self._gpu:
            torch.cuda.synchronize()
        found = dict.fromkeys(("data", "forward", "backward", "step"), 0.0)
        for (phase, begin), (_, end) in pairwise(marks):
            if phase != "end":
                found[phase] += begin.elapsed_time(end) if self._gpu else 1e3 * (end - begin)
        return found


def profiled(step: Callable[[], Any], steps: int = 3) -> dict[str, float]:
    """How the time between the first and the last operation on the GPU is spent.

    `idle`: share in which none ran. `update`: share in which our AdamW's kernels did, fused into backward or
    not; `update_ms`: the same in milliseconds a step.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    update = sum(e.time_range.elapsed_us() for e in events if e.name.startswith(UPDATES))
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return {
        "idle": round(1.0 - busy / whole, 4),
        "update": round(update / whole, 4),
        "update_ms": round(1e-3 * update / steps, 4),
    }
