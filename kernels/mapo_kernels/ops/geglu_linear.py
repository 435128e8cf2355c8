"""GEGLU and the linear layer after it in one operator, which saves only the projection that GEGLU reads.

    g  = value · gate · Φ(gate),  value, gate = projected.chunk(2, -1)         see geglu.py
    y  = g Wᵀ + bias + scale · (g Aᵀ) Bᵀ                                       see _projections.py
    dg = dy W + scale · (dy B) A;  dprojected and g again from projected and dg, in one pass;  dW = dyᵀ g

Shapes: projected (…, 2F), W (N, F) dense or quantised, bias (N,), A (r, F), B (N, r), y (…, N).

Dtypes. GEGLU is computed in fp32 (fp64 if projected is) and rounded once; the products are in projected's
dtype, or autocast's. Gradients have their tensor's dtype.

Saved for backward: projected, and g Aᵀ with an adapter; neither g nor gelu(gate). g is made again only if W
or A needs a gradient. Least traffic besides the products, for M rows of b bytes an element: forward 3·M·F·b,
backward 5·M·F·b and M·F·b for g. That is what the kernels move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels._autocast import autocast_off
from mapo_kernels.ops._projection_ops import differentiate, empty_gradients, empty_outputs
from mapo_kernels.ops._projections import (
    Projection,
    check_input,
    check_projection,
    input_gradients,
    needs,
    pack,
    parameter_gradients,
    product_dtype,
    project,
    unpack,
)
from mapo_kernels.ops.geglu import geglu_backward, geglu_forward

# --- Operators ---


@torch.library.custom_op(
    "mapo::geglu_linear",
    mutates_args=(),
    schema="(Tensor projected, ScalarType dtype, Tensor[] tensors, str[] formats, float[] scales)"
    " -> (Tensor, Tensor)",
)
def _geglu_linear_op(
    projected: Tensor, dtype: torch.dtype, tensors: list[Tensor], formats: list[str], scales: list[float]
) -> tuple[Tensor, Tensor]:
    with autocast_off(projected.device):
        g = geglu_forward(projected).to(dtype)
        y, t = project(g.view(-1, g.shape[-1]), unpack(tensors, formats, scales))
    return y.view(*projected.shape[:-1], y.shape[1]), t


@_geglu_linear_op.register_fake
def _(
    projected: Tensor, dtype: torch.dtype, tensors: list[Tensor], formats: list[str], scales: list[float]
) -> tuple[Tensor, Tensor]:
    return empty_outputs(projected, dtype, tensors, formats, scales)


@torch.library.custom_op(
    "mapo::geglu_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor projected, Tensor t, Tensor[] tensors, str[] formats, float[] scales, "
    "bool[] needed) -> Tensor[]",
)
def _geglu_linear_backward_op(
    grad: Tensor,
    projected: Tensor,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],  # projected, then one per tensor
) -> list[Tensor]:
    of_projected, *of_tensors = needed
    with_g, with_dt = needs(of_tensors, formats, "weight", "a"), needs(of_tensors, formats, "a")
    found = []
    with autocast_off(grad.device):
        dy = [grad.reshape(-1, grad.shape[-1])]
        projections = unpack(tensors, formats, scales)
        dg, dt = input_gradients(dy, projections, with_dn=of_projected, with_dt=with_dt)
        g = None
        if dg is not None:
            dg = dg.view(*projected.shape[:-1], dg.shape[1])
            grad_projected, g = geglu_backward(projected, dg, with_output=with_g)
            found.append(grad_projected)
            del dg  # its memory is free for dW
        elif with_g:
            g = geglu_forward(projected)
        if g is not None:
            g = g.to(grad.dtype).view(-1, g.shape[-1])
        return found + parameter_gradients(of_tensors, dy, tensors, formats, scales, g, t, dt)


@_geglu_linear_backward_op.register_fake
def _(
    grad: Tensor,
    projected: Tensor,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],
) -> list[Tensor]:
    return empty_gradients([projected, *tensors], needed)


differentiate(_geglu_linear_op, _geglu_linear_backward_op, keeps_input=lambda *_: True)


# --- Public functions ---


def geglu_linear(projected: Tensor, projection: Projection) -> Tensor:
    """A linear layer over GEGLU, `projection(geglu(projected))`, saving only `projected`.

    Args:
        projected: (…, 2F), values and then their gates; fp16, bf16, fp32 or fp64, any strides.
        projection: weight (N, F), bias (N,) or None, adapter or None; weight and bias in projected's dtype,
            any floating dtype under autocast.

    Returns:
        (…, N) in projected's dtype, or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_input("projected", projected, "(…, 2F)")
    if projected.shape[-1] % 2:
        raise ValueError(
            f"projected: shape {tuple(projected.shape)} is not (…, 2F); the last dimension holds F values, "
            "then their F gates"
        )
    check_projection("projection", projection, projected.shape[-1] // 2, projected)
    tensors, formats, scales = pack([projection])
    y: Tensor = _geglu_linear_op(projected, product_dtype(projected), tensors, formats, scales)[0]
    return y
