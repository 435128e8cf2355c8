"""Layers whose weight is frozen and stored in few bits: a linear layer and a 2-D convolution.

    y  = x Wᵀ + bias            dx = dy W               frozen_linear
    y  = conv2d(x, W, bias)     dx = conv2d's           frozen_conv2d

W is dequantised inside the operator (weights.py), in forward and again in backward. Activations are not
quantised.

Shapes: x (…, C), W (N, C), y (…, N); x (N, C, H, W), W (O, C, kh, kw), y as `torch.conv2d` lays it out.
Dtypes: the product is in x's dtype, or autocast's; bias is cast. Saved for backward: the quantised weight and
nothing else; torch's convolution saves x although no weight trains. The input gradient of a convolution is
the transposed convolution of dy, which needs x's size only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mapo_kernels._autocast import autocast_off
from mapo_kernels.ops._linear import linear
from mapo_kernels.ops._projections import Projection, check_input, product_dtype
from mapo_kernels.weights import FrozenWeight, from_int8

# --- Operators ---


def _convolve(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """The convolution in x's dtype, or with `output_padding` the transposed one."""
    bias = None if bias is None else bias.to(x.dtype)
    weight = from_int8(codes, absmax, x.dtype)
    transposed = output_padding is not None
    out: Tensor
    with autocast_off(x.device):
        out = torch.ops.aten.convolution.default(
            x, weight, bias, stride, padding, dilation, transposed, output_padding or [0, 0], 1
        )
    return out


@torch.library.custom_op(
    "mapo::frozen_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor",
)
def _frozen_conv2d_op(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _convolve(x, codes, absmax, bias, stride, padding, dilation)


_frozen_conv2d_op.register_fake(_convolve)


def _input_gradient(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    return _convolve(grad, codes, absmax, None, stride, padding, dilation, output_padding)


_frozen_conv2d_backward_op = torch.library.custom_op(
    "mapo::frozen_conv2d_backward",
    _input_gradient,
    mutates_args=(),
    schema="(Tensor grad, Tensor codes, Tensor absmax, int[] stride, int[] padding, int[] dilation, "
    "int[] output_padding) -> Tensor",
)
_frozen_conv2d_backward_op.register_fake(_input_gradient)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, bias, *ctx.geometry = inputs
    stride, padding, dilation = ctx.geometry
    ctx.output_padding = [  # rows and columns at the end that no window has reached
        (size + 2 * p - d * (kernel - 1) - 1) % s
        for size, kernel, s, p, d in zip(x.shape[2:], codes.shape[2:], stride, padding, dilation, strict=True)
    ]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, absmax)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, _, _, of_bias, *_ = ctx.needs_input_grad
    dx = None
    if of_x:
        dx = _frozen_conv2d_backward_op(grad, *ctx.saved_tensors, *ctx.geometry, ctx.output_padding)
    dbias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if of_bias else None
    return dx, None, None, dbias, None, None, None


_frozen_conv2d_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public functions ---


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, saving nothing but the quantised weight.

    Args:
        x: (…, C), fp16, bf16, fp32 or fp64. Under autocast it is cast to autocast's dtype.
        weight: (N, C), quantised.
        bias: (N,) in any floating dtype, or None.

    Returns:
        (…, N) in x's dtype, or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    return linear(x, Projection(weight, bias))


def frozen_conv2d(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """`torch.conv2d` with one group, saving nothing but the quantised weight.

    Args:
        x: (N, C, H, W), fp16, bf16, fp32 or fp64. Under autocast it is cast to autocast's dtype.
        weight: int8 codes (O, C, kh, kw) with their scales.
        bias: (O,) in any floating dtype, or None.
        stride: for height and width, as are `padding` and `dilation`.
        padding: zeros on each side.
        dilation: distance between the kernel's elements.

    Returns:
        (N, O, H', W') in x's dtype, or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_input("x", x, "(N, C, H, W)")
    codes, absmax = weight.tensors
    if x.ndim != 4 or codes.ndim != 4 or x.shape[1] != codes.shape[1]:
        raise ValueError(f"x: shape {tuple(x.shape)} does not fit a weight of shape {tuple(codes.shape)}")
    if bias is not None and bias.shape != codes.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)} is not ({len(codes)},)")
    if codes.device != x.device:
        raise ValueError(f"weight: is on {codes.device} but x is on {x.device}; move one of them")
    y: Tensor = _frozen_conv2d_op(
        x.to(product_dtype(x)), codes, absmax, bias, list(stride), list(padding), list(dilation)
    )
    return y
