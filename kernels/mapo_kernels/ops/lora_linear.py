"""LoRA linear layer: a frozen projection and its low-rank adapter in one operator.

    t  = x Aᵀ                                   y  = x Wᵀ + bias + scale · t Bᵀ
    dt = scale · dy B                           dx = dy W + dt A
    dA = dtᵀ x     dB = scale · dyᵀ t           dW = dyᵀ x     dbias = Σ_rows dy, where asked for

Shapes: x (…, C), W (N, C), bias (N,), A (r, C), B (N, r), y (…, N). W is dense, or quantised by bitsandbytes
(nf4, fp4, int8) and then dequantised inside the operator, forward and backward.

Dtypes. The products are in x's dtype, or autocast's. Factors may be fp32 beside a bf16 x: they are cast, x is
not, where peft makes and saves an fp32 copy of x. Gradients have their parameter's dtype.

Saved for backward: x and t; without a gradient for W and A only t. Least traffic: what the linear layer reads
and writes, and in forward one more read of x, M·r written and read, and y read and written once more.

Source: Hu et al., LoRA (arXiv 2106.09685); peft's `lora.Linear` without dropout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mapo_kernels._autocast import autocast_off
from mapo_kernels.ops._projections import (
    Lora,
    Projection,
    check_input,
    check_projection,
    input_gradients,
    needs,
    pack,
    parameter_gradients,
    product_dtype,
    project,
    total_rank,
    unpack,
    widths,
)
from mapo_kernels.weights import FrozenWeight

# --- Operators ---


@torch.library.custom_op(
    "mapo::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, str[] formats, float[] scales) -> (Tensor, Tensor)",
)
def _lora_linear_op(
    x: Tensor, tensors: list[Tensor], formats: list[str], scales: list[float]
) -> tuple[Tensor, Tensor]:
    with autocast_off(x.device):
        y, t = project(x.reshape(-1, x.shape[-1]), unpack(tensors, formats, scales))
    return y.view(*x.shape[:-1], y.shape[1]), t


@_lora_linear_op.register_fake
def _(x: Tensor, tensors: list[Tensor], formats: list[str], scales: list[float]) -> tuple[Tensor, Tensor]:
    projections = unpack(tensors, formats, scales)
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a symbolic size
    return x.new_empty((*x.shape[:-1], *widths(projections))), x.new_empty((rows, total_rank(projections)))


@torch.library.custom_op(
    "mapo::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? x, Tensor t, Tensor[] tensors, str[] formats, float[] scales, "
    "bool[] needed) -> Tensor[]",
)
def _lora_linear_backward_op(
    grad: Tensor,
    x: Tensor | None,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],  # x, then one per tensor
) -> list[Tensor]:
    of_x, *of_tensors = needed
    with_dt = needs(of_tensors, formats, "a")
    with autocast_off(grad.device):
        dy = [grad.reshape(-1, grad.shape[-1])]
        dx, dt = input_gradients(dy, unpack(tensors, formats, scales), with_dn=of_x, with_dt=with_dt)
        n = None if x is None else x.reshape(-1, x.shape[-1])
        found = parameter_gradients(of_tensors, dy, tensors, formats, scales, n, t, dt)
    return found if dx is None else [dx.view(*grad.shape[:-1], dx.shape[1]), *found]


@_lora_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],
) -> list[Tensor]:
    features = unpack(tensors, formats, scales)[0].weight.shape[1]
    shapes = [grad.new_empty((*grad.shape[:-1], features)), *tensors]
    return [i.new_empty(i.shape) for i, need in zip(shapes, needed, strict=True) if need]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, tensors, formats, scales = inputs
    _, t = output
    with_x = needs([tensor.requires_grad for tensor in tensors], formats, "weight", "a")
    ctx.save_for_backward(x if with_x else None, t, *tensors)
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)  # else zeros are made for t
    ctx.formats, ctx.scales = formats, scales


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, [None] * len(ctx.needs_input_grad[1]), None, None
    x, t, *tensors = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = iter(_lora_linear_backward_op(grad, x, t, tensors, ctx.formats, ctx.scales, needed))
    dx, *rest = [next(found) if need else None for need in needed]
    return dx, rest, None, None


_lora_linear_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public functions ---


def lora_linear(
    x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, saving x and the rank-r product only.

    Args:
        x: (…, C), fp16, bf16, fp32 or fp64, any strides. Under autocast it is cast to autocast's dtype.
        weight: (N, C) in x's dtype (any floating dtype under autocast), usually frozen; or what
            `frozen_or_dense` returns for a layer that bitsandbytes has quantised.
        bias: (N,) in the weight's dtype, or None.
        a: (r, C) factor in any floating dtype; fp32 factors beside a bf16 x are usual.
        b: (N, r) factor.
        scale: alpha / r.

    Returns:
        (…, N) in x's dtype, or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_input("x", x, "(…, C)")
    projection = Projection(weight, bias, Lora(a, b, scale))
    check_projection("projection", projection, x.shape[-1], x)
    tensors, formats, scales = pack([projection])
    y: Tensor = _lora_linear_op(x.to(product_dtype(x)), tensors, formats, scales)[0]
    return y
