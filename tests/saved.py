"""What a call keeps for backward under torch.compile's partitioner; `saved_bytes` counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.measure import saved_bytes

__all__ = ["compiled", "saved_bytes"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in one graph, cut by the partitioner that decides what Inductor saves and recomputes."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
