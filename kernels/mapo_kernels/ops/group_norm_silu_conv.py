"""Group normalisation, SiLU and a 2-D convolution in one operator that saves the normalisation's input only.

    y   = silu(group_norm(x)) in the convolution's dtype        group_norm_silu.py
    out = conv2d(y, conv_weight, conv_bias)                      torch's own, cuDNN on a GPU

y is not saved. Backward, in this order:

    grad_y = the convolution's input gradient                    needs no y
    grad_x, norm gradients, and y again if conv_weight trains    one pass writes y and the sums
    grad of conv_weight and conv_bias from y; y is freed

One opaque operator with its own backward operator: torch.compile would merge a recomputation that it sees
with the forward, and save y after all.

Shapes. x (N, C, H, W), contiguous or channels_last; conv_weight (O, C, kh, kw); out as `torch.conv2d` lays it
out. Dtypes: fp16, bf16, fp32, fp64; x may differ from the weights. Under autocast x stays as it is, y is
written in autocast's dtype, and the convolution's weight and bias are cast to it inside the operator, in
forward and again in backward. y is rounded once. A gradient has its parameter's dtype.

A quantised convolution weight is frozen: int8 codes and one absmax per group of input channels, see
`weights.from_int8`. It is made dense in y's dtype inside the operator, in forward and again in backward.

Saved for backward: x, mean and rstd (N, groups); of weights only the parameters, or the codes. Least traffic
besides the convolution: forward reads x and writes y; backward reads x and grad_y and writes grad_x, and y if
conv_weight trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mapo_kernels._autocast import autocast_dtype, autocast_off
from mapo_kernels._rows import FLOATING, accumulator
from mapo_kernels.ops.group_norm_silu import (
    check_group_norm,
    dense,
    group_norm_silu_apply,
    group_norm_silu_backward,
    group_norm_silu_forward,
    walkable,
)
from mapo_kernels.weights import FrozenWeight, from_int8

# --- Operators ---


def _dense(weight: Tensor, absmax: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if absmax is None else from_int8(weight, absmax, dtype)


def _convolution(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    absmax: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of y in y's dtype: weight and bias are cast to it."""
    weight, bias = _dense(weight, absmax, y.dtype), None if bias is None else bias.to(y.dtype)
    out: Tensor
    with autocast_off(y.device):
        out = torch.ops.aten.convolution.default(y, weight, bias, stride, padding, dilation, False, [0, 0], 1)
    return out


@torch.library.custom_op(
    "mapo::group_norm_silu_conv",
    mutates_args=(),
    schema="(Tensor x, int num_groups, Tensor? norm_weight, Tensor? norm_bias, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor? conv_absmax, float eps, ScalarType dtype, int[] stride, int[] padding, "
    "int[] dilation) -> (Tensor, Tensor, Tensor)",
)
def _group_norm_silu_conv_op(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_absmax: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = group_norm_silu_forward(x, num_groups, norm_weight, norm_bias, eps, True, out_dtype=dtype)
    return _convolution(y, conv_weight, conv_bias, conv_absmax, stride, padding, dilation), mean, rstd


@_group_norm_silu_conv_op.register_fake
def _(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_absmax: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x, norm_weight, norm_bias)
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=acc) for _ in range(2))
    y = torch.empty_like(x, dtype=dtype)
    return _convolution(y, conv_weight, conv_bias, conv_absmax, stride, padding, dilation), mean, rstd


@torch.library.custom_op(
    "mapo::group_norm_silu_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, Tensor rstd, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor? conv_absmax, int[] stride, int[] padding, "
    "int[] dilation, bool[] needs) -> Tensor[]",
)
def _group_norm_silu_conv_backward_op(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_absmax: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients, in this order: x, norm weight, norm bias, conv weight, conv bias."""
    dtype = grad.dtype  # the convolution's

    def convolution_backward(y: Tensor, *mask: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
        if mask[0]:
            weight = _dense(conv_weight, conv_absmax, dtype)  # not kept: it may be larger than all the rest
        else:  # then torch looks only at its shape and layout
            weight = torch.empty_like(conv_weight, dtype=dtype) if conv_weight.dtype != dtype else conv_weight
        gradients = torch.ops.aten.convolution_backward.default(
            grad, y, weight, [len(weight)], stride, padding, dilation, False, [0, 0], 1, mask
        )
        return gradients

    need_x, need_norm_weight, need_norm_bias, need_weight, need_bias = needs
    found: list[Tensor | None] = []
    # Without a weight gradient, torch looks only at y's shape, layout and dtype.
    y = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    with autocast_off(x.device):
        if need_x or need_norm_weight or need_norm_bias:
            grad_y, _, _ = convolution_backward(y, True, False, False)
            assert grad_y is not None
            norm = group_norm_silu_backward(
                grad_y, x, norm_weight, norm_bias, mean, rstd, True,
                with_input=need_x, with_weight=need_norm_weight, with_bias=need_norm_bias,
                with_output=need_weight,
            )  # fmt: skip
            del grad_y
            found += norm[:3]
            y = y if norm.y is None else norm.y
        elif need_weight:
            y = group_norm_silu_apply(x, norm_weight, norm_bias, mean, rstd, True, dtype)
        if need_weight:
            _, grad_weight, grad_bias = convolution_backward(y, False, True, need_bias)
            assert grad_weight is not None
            if (grad_weight.dtype, grad_weight.stride()) != (
                conv_weight.dtype,
                conv_weight.stride(),  # cuDNN and oneDNN lay it out like y
            ):
                grad_weight = torch.empty_like(conv_weight).copy_(grad_weight)
            if grad_bias is not None and conv_bias is not None:
                grad_bias = grad_bias.to(conv_bias.dtype)
            found += [grad_weight, grad_bias]
        elif need_bias and conv_bias is not None:
            found.append(grad.sum((0, 2, 3), dtype=conv_bias.dtype))  # oneDNN would return both
    return [g for g in found if g is not None]


@_group_norm_silu_conv_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_absmax: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (x, norm_weight, norm_bias, conv_weight, conv_bias)
    return [torch.empty_like(t) for need, t in zip(needs, inputs, strict=True) if need and t is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, norm_weight, norm_bias, conv_weight, conv_bias, conv_absmax, _, _, *ctx.geometry = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # else zeros are made for them
    ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, conv_weight, conv_bias, conv_absmax)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5)]
    gradients = iter(_group_norm_silu_conv_backward_op(grad, *ctx.saved_tensors, *ctx.geometry, needs))
    grad_x, *parameters = (next(gradients) if need else None for need in needs)
    return grad_x, None, *parameters, None, None, None, None, None, None


_group_norm_silu_conv_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public functions ---


def _pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: {value!r} is not a whole number >= {least} or two of them")
    return pair


def group_norm_silu_conv(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor | FrozenWeight,
    conv_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """`conv2d(group_norm_silu(x), conv_weight, conv_bias)`, whose input is computed again for backward.

    Args:
        x: (N, C, H, W), fp16, bf16, fp32 or fp64. Contiguous and channels_last tensors are walked where they
            lie; anything else is copied first.
        num_groups: divides C.
        norm_weight: (C,), or None for 1; its dtype may differ from x's.
        norm_bias: (C,), or None for 0.
        conv_weight: (O, C, kh, kw), one group. The convolution runs in its dtype, or in autocast's. Or a
            quantised one, int8 codes of that shape: then it runs in x's dtype, or in autocast's.
        conv_bias: (O,) in conv_weight's dtype (any floating dtype with a quantised one), or None.
        eps: added to the biased variance.
        stride: of the convolution, as are `padding` and `dilation`: a number, or two for height and width.
        padding: zeros on each side.
        dilation: distance between the kernel's elements.

    Returns:
        (N, O, H', W') in the convolution's dtype and in the memory format that `torch.conv2d` gives it.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting does not fit; the message names it.
    """
    check_group_norm(x, num_groups, norm_weight, norm_bias, prefix="norm_")
    if x.ndim != 4:
        raise ValueError(f"x: shape {tuple(x.shape)} is not (N, C, H, W)")
    weight, absmax = conv_weight.tensors if isinstance(conv_weight, FrozenWeight) else (conv_weight, None)
    stored = FLOATING if absmax is None else (torch.int8,)
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or weight.dtype not in stored:
        raise ValueError(
            f"conv_weight: {tuple(weight.shape)} of {weight.dtype} does not fit x of shape "
            f"{tuple(x.shape)}; pass floating-point numbers, (O, {x.shape[1]}, kh, kw)"
        )
    dtype = weight.dtype if absmax is None else x.dtype
    if conv_bias is not None and (
        conv_bias.shape != weight.shape[:1] or (absmax is None and conv_bias.dtype != dtype)
    ):
        raise ValueError(
            f"conv_bias: {tuple(conv_bias.shape)} of {conv_bias.dtype} does not fit conv_weight; pass "
            f"({len(weight)},) of {dtype}, or None"
        )
    for name, parameter in (("conv_weight", weight), ("conv_bias", conv_bias)):
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{name}: is on {parameter.device} but x is on {x.device}; move one of them")
    geometry = (_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1))
    if dtype != torch.float64:
        dtype = autocast_dtype(x.device) or dtype
    norm = (walkable(x), num_groups, dense(norm_weight), dense(norm_bias))
    out: Tensor = _group_norm_silu_conv_op(*norm, weight, conv_bias, absmax, float(eps), dtype, *geometry)[0]
    return out
