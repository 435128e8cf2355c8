"""What a step of AdamW8bit is given: tensors and settings, the order in memory, and the checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mapo_kernels._rows import FLOATING

QUANTISED_BLOCK = 256
"""Elements that share a largest magnitude."""


class Settings(NamedTuple):
    """What all tensors of a step share."""

    lr: Tensor  # one element, on the device, like the next three
    seed: Tensor | None  # int64; None rounds to nearest
    found_inf: Tensor | None  # or one for each tensor
    grad_scale: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_update_rms: float | None


class Tensors(NamedTuple):
    """The tensors of a step, lists of equal length; all of one parameter lie in memory in one order."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    state1: Sequence[Tensor]
    state2: Sequence[Tensor]
    absmax1: Sequence[Tensor]  # empty tensors where moments are fp32
    absmax2: Sequence[Tensor]
    steps: Sequence[Tensor]
    ids: Sequence[int]


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return a.stride() == b.stride() or all(
        x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def in_order(x: Tensor, like: Tensor) -> Tensor:
    """x, copied if need be, with its elements in memory in the order of a dense `like`."""
    if x.stride() == like.stride() or same_order(x, like):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def check(tensors: Tensors) -> None:
    if len({len(values) for values in tensors}) > 1:
        raise ValueError(
            f"adamw8bit_: the lists have different lengths: {[len(values) for values in tensors]}"
        )
    device = tensors.params[0].device
    for p, g, state1, state2, absmax1, absmax2, step, tensor_id in zip(*tensors, strict=True):
        name = f"parameter {tensor_id} of shape {tuple(p.shape)}"
        if p.dtype not in FLOATING or g.dtype not in FLOATING:
            raise TypeError(
                f"{name}: dtype {p.dtype} with a {g.dtype} gradient is not supported; use a float"
            )
        if any(t.device != device for t in (p, g, state1, state2, absmax1, absmax2, step)):
            raise ValueError(f"{name}: it, its gradient and its state must all be on {device}")
        if g.shape != p.shape or state1.shape != p.shape or state2.shape != p.shape:
            raise ValueError(
                f"{name}: gradient {tuple(g.shape)} and moments {tuple(state1.shape)}, {tuple(state2.shape)} "
                "must have its shape"
            )
        if not all(same_order(p, t) for t in (g, state1, state2, torch.empty_like(p, device="meta"))):
            raise ValueError(
                f"{name}: strides {p.stride()}; it must be dense, and its gradient and moments must lie in "
                "memory in the same order: make them contiguous"
            )
        quantised = state1.dtype == torch.uint8
        blocks = -(-p.numel() // QUANTISED_BLOCK) if quantised else 0
        if state1.dtype != state2.dtype or state1.dtype not in (torch.uint8, torch.float32):
            raise TypeError(
                f"{name}: moments are {state1.dtype} and {state2.dtype}; both must be uint8 or fp32"
            )
        for absmax in (absmax1, absmax2):
            if absmax.numel() != blocks or absmax.dtype != torch.float32:
                raise ValueError(
                    f"{name}: absmax is {absmax.dtype} {tuple(absmax.shape)}; pass fp32 ({blocks},), one for "
                    f"every {QUANTISED_BLOCK} elements of uint8 moments"
                )
        if step.dtype != torch.int64 or step.numel() != 1:
            raise TypeError(
                f"{name}: its step is {step.dtype} {tuple(step.shape)}; pass int64 with one element"
            )


def check_flags(found_inf: Tensor | None, tensors: int) -> None:
    if found_inf is None or found_inf.numel() == 1:
        return
    if found_inf.shape != (tensors,) or not found_inf.is_contiguous():
        raise ValueError(
            f"found_inf: {tuple(found_inf.shape)} for {tensors} tensors; pass one value, or ({tensors},) "
            "contiguous"
        )
