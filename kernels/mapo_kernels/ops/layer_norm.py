"""Layer normalisation over the last dimension, with a residual added in the same pass.

    s       = x + residual, rounded to x's dtype; x itself without a residual
    mean    = Σ s/C,   rstd = 1/√(Σ (s − mean)²/C + eps)       per row
    y       = n · weight + bias,   n = (s − mean) · rstd
    ∂s      = rstd · (g − Σ g/C − n · Σ g·n/C) + grad_s,   g = grad_y · weight;   ∂x = ∂residual = ∂s
    ∂weight = Σ grad_y · n,   ∂bias = Σ grad_y                over the rows

grad_s is the gradient that arrives at s from elsewhere: in a transformer block s is also the next residual.

Shapes. x, residual, y, s are (…, C), weight and bias (C,) or None. Rows may lie anywhere in memory; a last
dimension that is not contiguous is copied first.

One launch forward; one backward, and a small second one for the gradients of weight and bias
(`_layer_norm_kernels.py`). A large mean does not cancel. No float atomics: on one kind of card equal inputs
give equal bits.

Dtypes. All is converted to fp32 on load, to fp64 if one input is fp64. mean and rstd have that dtype, y and s
that of x, whatever the parameters have, under autocast too.

Saved for backward: x (or s), mean and rstd, not y. Least traffic for N elements of b bytes: forward 2·N·b
(4·N·b with a residual), backward 3·N·b (4·N·b with grad_s), plus N·b where it also returns y again. Besides,
the kernels read weight and bias once per program, and write and read C partial sums per program and
parameter.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from mapo_kernels._rows import FLOATING, accumulator
from mapo_kernels.hardware import backend
from mapo_kernels.ops._layer_norm_kernels import MOST_CHANNELS, launch_backward, launch_forward

# --- The same without Triton ---


def _eager_affine(n: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        n = n * weight.to(n.dtype)
    return n if bias is None else n + bias.to(n.dtype)


def _eager_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    acc = accumulator(x, weight, bias, residual)
    summed = None
    if residual is not None:
        x = summed = (x.to(acc) + residual.to(acc)).to(x.dtype).contiguous()
    s = x.to(acc)
    mean = s.mean(-1, keepdim=True)
    rest = (s - mean).mean(-1, keepdim=True)
    variance = (s - mean).square().mean(-1, keepdim=True) - rest * rest
    mean = mean + rest
    rstd = torch.rsqrt(variance + eps)
    y = _eager_affine((s - mean) * rstd, weight, bias).to(out_dtype).contiguous()
    return y, mean.flatten(), rstd.flatten(), summed


def _eager_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    acc = mean.dtype
    per_row = (*x.shape[:-1], 1)
    n = (x.to(acc) - mean.view(per_row)) * rstd.view(per_row)
    return _eager_affine(n, weight, bias).to(out_dtype).contiguous()


def _eager_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    with_output: bool,
    with_params: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    acc = mean.dtype
    per_row = (*x.shape[:-1], 1)
    scale = rstd.view(per_row)
    n = (x.to(acc) - mean.view(per_row)) * scale
    grad = grad_y.to(acc)
    g = grad if weight is None else grad * weight.to(acc)
    grad_x = scale * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + grad_sum.to(acc)
    rows = tuple(range(x.ndim))  # after unsqueeze: x may be a single row, (C,)
    grad_weight = grad_bias = None
    if with_params and weight is not None:
        grad_weight = (grad * n).unsqueeze(0).sum(rows).to(weight.dtype)
    if with_params and bias is not None:
        grad_bias = grad.unsqueeze(0).sum(rows).to(bias.dtype)
    y = _eager_affine(n, weight, bias).to(grad_y.dtype).contiguous() if with_output else None
    return grad_x.to(x.dtype).contiguous(), grad_weight, grad_bias, y


# --- Without autograd, for operators that contain this one ---


def _is_eager(x: Tensor) -> bool:
    return backend(x.device).name == "eager" or x.numel() == 0 or x.shape[-1] > MOST_CHANNELS


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return y (…, C) in out_dtype (x's if None), mean and rstd (rows,), and x + residual if there is one.

    All contiguous. No autograd.
    """
    if _is_eager(x):
        return _eager_forward(x, weight, bias, eps, residual, out_dtype or x.dtype)
    return launch_forward(x, weight, bias, eps, residual, out_dtype or x.dtype, None)


def layer_norm_apply(
    x: Tensor,  # what was normalised: x, or x + residual
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute y again from the saved statistics; equal to forward's to a rounding. No autograd."""
    if _is_eager(x):
        return _eager_apply(x, weight, bias, mean, rstd, out_dtype or x.dtype)
    return launch_forward(x, weight, bias, 0.0, None, out_dtype or x.dtype, (mean, rstd))[0]


def layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,  # what was normalised: x, or x + residual
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    grad_sum: Tensor | None = None,
    with_output: bool,
    with_params: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, and y again (in grad_y's dtype) if asked for.

    `grad_sum`, the gradient that arrives at x + residual from elsewhere, is added to that of x in the same
    pass. Without `with_params`, or where there is no such parameter, its gradient is None. No autograd.
    """
    run = _eager_backward if _is_eager(x) else launch_backward
    return run(grad_y, x, weight, bias, mean, rstd, grad_sum, with_output, with_params)


# --- Operators ---


@torch.library.custom_op(
    "mapo::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_forward(x, weight, bias, eps, None)[:3]


@_layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    acc, rows = accumulator(x, weight, bias), math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty(rows, dtype=acc), x.new_empty(rows, dtype=acc)


@torch.library.custom_op(
    "mapo::add_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_layer_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd, summed = layer_norm_forward(x, weight, bias, eps, residual)
    assert summed is not None
    return y, mean, rstd, summed


@_add_layer_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc, rows = accumulator(x, weight, bias, residual), math.prod(x.shape[:-1])
    y, summed = x.new_empty(x.shape), x.new_empty(x.shape)
    return y, x.new_empty(rows, dtype=acc), x.new_empty(rows, dtype=acc), summed


@torch.library.custom_op(
    "mapo::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " Tensor? grad_sum, bool with_params) -> Tensor[]",
)
def _layer_norm_backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    with_params: bool,
) -> list[Tensor]:
    grads = layer_norm_backward(
        grad_y, x, weight, bias, mean, rstd, grad_sum=grad_sum, with_output=False, with_params=with_params
    )
    return [g for g in grads if g is not None]


@_layer_norm_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    with_params: bool,
) -> list[Tensor]:
    params = [p for p in (weight, bias) if p is not None and with_params]
    return [x.new_empty(x.shape), *(p.new_empty(p.shape) for p in params)]


def _gradients(
    ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of what was normalised, of weight and of bias; None where there is or needs to be none."""
    if grad_y is None:  # at most the sum was used
        return grad_sum, None, None
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing lets them be unpacked a single time
    _, weight, bias, *_ = saved
    with_params = any(ctx.needs_input_grad[ctx.first_param : ctx.first_param + 2])
    grad, *rest = _layer_norm_backward_op(grad_y, *saved, grad_sum, with_params)
    grad_weight = rest.pop(0) if with_params and weight is not None else None
    return grad, grad_weight, rest.pop(0) if with_params and bias is not None else None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1], output[2])
    ctx.set_materialize_grads(False)  # mean and rstd never get one
    ctx.first_param = 1


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, grad_y, None), None


_layer_norm_op.register_autograd(_backward, setup_context=_save_for_backward)


def _save_sum_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, residual, weight, bias, _ = inputs
    _, mean, rstd, summed = output
    ctx.save_for_backward(summed, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.first_param = 2
    ctx.residual_dtype = residual.dtype


def _backward_of_sum(
    ctx: Any, grad_y: Tensor | None, _mean: Any, _rstd: Any, grad_sum: Tensor | None
) -> tuple[Any, ...]:
    grad, grad_weight, grad_bias = _gradients(ctx, grad_y, grad_sum)
    grad_residual = None if grad is None else grad.to(ctx.residual_dtype)
    return grad, grad_residual, grad_weight, grad_bias, None


_add_layer_norm_op.register_autograd(_backward_of_sum, setup_context=_save_sum_for_backward)


# --- Public ---


def _check(name: str, tensor: Any, shape: tuple[int, ...], x: Tensor, role: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: pass a fp16, bf16, fp32 or fp64 tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not {shape}, {role}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: is on {tensor.device} but x is on {x.device}; move it there")


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimension; with a residual, of x + residual, in one pass.

    Args:
        x: (…, C); fp16, bf16, fp32 or fp64, any strides. With mean and rstd it is all that is saved.
        weight, bias: (C,) or None, each in any of these dtypes.
        eps: added to the variance.
        residual: as x, in any of these dtypes. The sum is rounded to x's dtype before it is normalised; it is
            then saved in x's place.

    Returns:
        y, (…, C), contiguous, in the dtype of x, under autocast too (torch's returns fp32 there); with a
        residual (y, x + residual), both differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit; the message names it.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError("x: pass a fp16, bf16, fp32 or fp64 tensor of shape (..., C)")
    if x.ndim == 0:
        raise ValueError("x: shape () has no dimension to normalise; pass (..., C)")
    for name, param in (("weight", weight), ("bias", bias)):
        if param is not None:
            _check(name, param, tuple(x.shape[-1:]), x, "the last dimension of x")
    if residual is None:
        y: Tensor = _layer_norm_op(x, weight, bias, float(eps))[0]
        return y
    _check("residual", residual, tuple(x.shape), x, "that of x; expand it first")
    y, _, _, summed = _add_layer_norm_op(x, residual, weight, bias, float(eps))
    return y, summed


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension, computed by `layer_norm`; its `state_dict` is the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (…, C). Raises ValueError if the last dimension is not all of `normalized_shape`."""
        if tuple(input.shape[-1:]) != tuple(self.normalized_shape):
            raise ValueError(
                f"input: shape {tuple(input.shape)} does not end in one dimension of "
                f"normalized_shape={tuple(self.normalized_shape)}"
            )
        return layer_norm(input, self.weight, self.bias, self.eps)
