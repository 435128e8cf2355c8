"""The few things every launcher needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from mapo_kernels.hardware import INTERPRETING, assumed_card

LARGEST_INTERPRETED_BLOCK = 65536


def block_size(production: int, size: int) -> int:
    """Elements per program along an axis of `size`: `production`, but few large ones for the interpreter.

    The interpreter's cost is per program, not per element. The result is a power of two.
    """
    if not INTERPRETING or assumed_card() is not None:
        return production
    return min(LARGEST_INTERPRETED_BLOCK, max(16, 1 << max(0, size - 1).bit_length()))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_counters: dict[tuple[torch.device, int], Tensor] = {}


def completion_counter(device: torch.device) -> Tensor:
    """Return an int32 (1,) counter that is 0 when the next kernel on the current stream starts.

    A kernel counts its finished programs in it; the last one does the work that needs all the others, and
    sets the counter back to 0. So it has to be cleared only once, not before every launch. Why this is safe:

    - Kernels of one stream run one after another, so one counter per (device, stream) is never shared.
      PyTorch's streams live as long as the process, so a stream's handle is not given to another one.
    - A CUDA graph may be replayed on any stream, next to eager work or to other graphs. A launch that is
      being captured therefore gets its own counter from the graph's pool; its clearing is captured with it.
    - CUDA-graph trees of `torch.compile` would find a cached counter inside their private pool: ops that use
      this counter carry the tag `cudagraph_unsafe`, which makes Inductor run them outside its graphs.
    - Where a card is only assumed, for a count of memory, nothing runs: every launch gets its own, so that a
      count does not depend on earlier ones.
    """
    stream = 0
    if assumed_card() is not None:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    counter = _counters.get((device, stream))
    if counter is None:
        counter = _counters[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter
