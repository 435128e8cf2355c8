"""LayerNorm and the projections that read it in one operator, which does not save the normalised tensor.

    s   = x + residual, rounded to x's dtype; x itself without a residual      see layer_norm.py
    n   = layer_norm(s)
    y_i = n W_iᵀ + bias_i + scale_i · (n A_iᵀ) B_iᵀ                            see _projections.py
    dn  = Σ dy_i W_i + Σ scale_i · (dy_i B_i) A_i
    ds  = gradient of the norm + the gradient that arrives at s from elsewhere, and n again, in one pass
    dW_i = dy_iᵀ n,  dA_i = scale_i · (dy_i B_i)ᵀ n

Shapes: x and residual (…, C), norm weight and bias (C,) or None, W_i (N_i, C) dense or quantised, y_i
(…, N_i): one tensor, or views of one (…, ΣN) tensor. Weights that are adjacent rows of one matrix
(`join_weights`) are one matrix product forward. Backward accumulates dn in one buffer, without concatenating
the dy_i.

Dtypes. The norm is computed in fp32 (fp64 if an input is) from parameters of any dtype, and rounded once, to
the products' dtype: x's, or autocast's. Gradients have their tensor's dtype.

Saved for backward: s, its mean and rstd per row, and n A_iᵀ with adapters. s is also the next residual, so
usually it costs nothing. n is made again only if a W or A needs a gradient. Least traffic besides the
products, for M rows of b bytes an element: forward 2·M·C·b (4·M·C·b with a residual), backward 3·M·C·b, and
M·C·b each for the gradient that arrives at s and for n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mapo_kernels._autocast import autocast_off
from mapo_kernels._rows import accumulator
from mapo_kernels.ops._projection_ops import empty_gradients, empty_outputs
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
    widths,
)
from mapo_kernels.ops.layer_norm import layer_norm_apply, layer_norm_backward, layer_norm_forward

# --- Operators ---


@torch.library.custom_op(
    "mapo::layer_norm_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "ScalarType dtype, Tensor[] tensors, str[] formats, float[] scales) -> Tensor[]",
)
def _layer_norm_linear_op(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
) -> list[Tensor]:
    """Return y (…, ΣN), t, mean, rstd, and x + residual if there is a residual."""
    with autocast_off(x.device):
        n, mean, rstd, summed = layer_norm_forward(x, norm_weight, norm_bias, eps, residual, dtype)
        y, t = project(n.view(-1, n.shape[-1]), unpack(tensors, formats, scales))
    y = y.view(*x.shape[:-1], y.shape[1])
    return [y, t, mean, rstd] if summed is None else [y, t, mean, rstd, summed]


@_layer_norm_linear_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
) -> list[Tensor]:
    y, t = empty_outputs(x, dtype, tensors, formats, scales)
    acc = accumulator(x, norm_weight, norm_bias, residual)
    mean, rstd = (x.new_empty(t.shape[0], dtype=acc) for _ in range(2))
    return [y, t, mean, rstd, *([] if residual is None else [x.new_empty(x.shape)])]


@torch.library.custom_op(
    "mapo::layer_norm_linear_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor? grad_sum, Tensor x, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor mean, Tensor rstd, Tensor t, Tensor[] tensors, str[] formats, float[] scales, bool[] needed)"
    " -> Tensor[]",
)
def _layer_norm_linear_backward_op(
    grads: list[Tensor],  # of the y_i, (…, N_i)
    grad_sum: Tensor | None,
    x: Tensor,  # what was normalised
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],  # x, norm_weight, norm_bias, then one per tensor
) -> list[Tensor]:
    of_norm, of_tensors = needed[:3], needed[3:]
    with_n, with_dt = needs(of_tensors, formats, "weight", "a"), needs(of_tensors, formats, "a")
    norm = (x, norm_weight, norm_bias, mean, rstd)
    found = []
    with autocast_off(x.device):
        dy = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        projections = unpack(tensors, formats, scales)
        dn, dt = input_gradients(dy, projections, with_dn=any(of_norm), with_dt=with_dt)
        n = None
        if dn is not None:
            *of_inputs, n = layer_norm_backward(
                dn.view(x.shape),
                *norm,
                grad_sum=grad_sum,
                with_output=with_n,
                with_params=any(of_norm[1:]),
            )
            found = [g for g, need in zip(of_inputs, of_norm, strict=True) if need and g is not None]
            del dn  # its memory is free for the dW
        elif with_n:
            n = layer_norm_apply(*norm, grads[0].dtype)
        if n is not None:
            n = n.view(-1, n.shape[-1])
        return found + parameter_gradients(of_tensors, dy, tensors, formats, scales, n, t, dt)


@_layer_norm_linear_backward_op.register_fake
def _(
    grads: list[Tensor],
    grad_sum: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],
) -> list[Tensor]:
    return empty_gradients([x, norm_weight, norm_bias, *tensors], needed)


class _LayerNormLinear(torch.autograd.Function):
    """Splits y into the y_i, and takes their gradients one by one.

    An operator may not return views of one tensor, and autograd's own split would concatenate the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        formats: list[str],
        scales: list[float],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        y, t, mean, rstd, *summed = _layer_norm_linear_op(
            x, residual, norm_weight, norm_bias, eps, dtype, list(tensors), formats, scales
        )
        ctx.save_for_backward(summed[0] if summed else x, norm_weight, norm_bias, mean, rstd, t, *tensors)
        ctx.formats, ctx.scales = formats, scales
        ctx.residual_dtype = None if residual is None else residual.dtype
        sizes = widths(unpack(tensors, formats, scales))
        return (*(y.split_with_sizes(sizes, -1) if len(sizes) > 1 else (y,)), *summed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, norm_weight, norm_bias, mean, rstd, t, *tensors = ctx.saved_tensors
        of_x, of_residual, of_weight, of_bias, _, _, _, _, *of_tensors = ctx.needs_input_grad
        needed = [of_x or of_residual, of_weight, of_bias, *of_tensors]
        outputs = len(ctx.formats)
        found = iter(
            _layer_norm_linear_backward_op(
                list(grads[:outputs]),
                None if ctx.residual_dtype is None else grads[outputs],
                x,
                norm_weight,
                norm_bias,
                mean,
                rstd,
                t,
                tensors,
                ctx.formats,
                ctx.scales,
                needed,
            )
        )
        dx, dweight, dbias, *rest = [next(found) if need else None for need in needed]
        dresidual = dx.to(ctx.residual_dtype) if of_residual and dx is not None else None
        return (dx if of_x else None, dresidual, dweight, dbias, None, None, None, None, *rest)


# --- Public functions ---


@overload
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projections: Sequence[Projection],
    eps: float = ...,
) -> tuple[Tensor, ...]: ...
@overload
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projections: Sequence[Projection],
    eps: float = ...,
    *,
    residual: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor]: ...
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projections: Sequence[Projection],
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], Tensor]:
    """Projections of layer_norm(x), or of layer_norm(x + residual), without saving the normalised tensor.

    Args:
        x: (…, C), fp16, bf16, fp32 or fp64, any strides.
        norm_weight: (C,) in any floating dtype, or None.
        norm_bias: (C,) in any floating dtype, or None.
        projections: one or more; weight (N, C), bias (N,) or None, adapter or None each; weight and bias in
            x's dtype, any floating dtype under autocast. `join_weights` makes several weights one product.
        eps: added to the variance.
        residual: (…, C), added to x first; the sum is rounded to x's dtype.

    Returns:
        One (…, N) per projection, in x's dtype or autocast's; several are views of one tensor, which cannot
        be changed in place. With a residual: (these, x + residual).

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_input("x", x, "(…, C)")
    features = x.shape[-1]
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (features,)),
        ("norm_bias", norm_bias, (features,)),
        ("residual", residual, tuple(x.shape)),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name}: pass a floating-point tensor of shape {shape}, or None")
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} on {tensor.device} is not {shape} on {x.device}, as x is"
            )
    if not projections:
        raise ValueError("projections: pass at least one; for none use layer_norm")
    for i, projection in enumerate(projections):
        check_projection(f"projections[{i}]", projection, features, x)
    tensors, formats, scales = pack(projections)
    outputs: tuple[Tensor, ...] = _LayerNormLinear.apply(  # type: ignore[no-untyped-call]
        x, residual, norm_weight, norm_bias, float(eps), product_dtype(x), formats, scales, *tensors
    )
    return outputs if residual is None else (outputs[:-1], outputs[-1])
