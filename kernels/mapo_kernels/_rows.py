"""What operators share: the types they take and compute in, and rows in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapo_kernels._triton import tl

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of tensors that operators take."""


def as_rows(x: Tensor) -> Tensor:
    """(…, C) with at least one element as (rows, C) whose rows lie anywhere but are contiguous themselves.

    A view where the strides allow one (contiguous tensors, slices of the last dimension), else a copy.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if one of the tensors is, else fp32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for an accumulator."""
    return tl.float64 if dtype == torch.float64 else tl.float32
