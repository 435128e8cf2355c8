"""Layer normalisation over the last dimension, with a residual added in the same pass.

    s    = x + residual, rounded to x's dtype; x itself without a residual
    mean = Σ s/C,   rstd = 1/√(Σ (s − mean)²/C + eps)       per row
    y    = n · weight + bias,   n = (s − mean) · rstd
    ∂s   = rstd · (g − Σ g/C − n · Σ g·n/C) + grad_s,   g = grad_y · weight;   ∂x = ∂residual = ∂s
    ∂weight = Σ grad_y · n,   ∂bias = Σ grad_y              over the rows

grad_s is the gradient that arrives at s from elsewhere: a transformer block uses s again, as the next residual.

Shapes. x, residual, y, s are (…, C), weight and bias (C,) or None. Rows may lie anywhere in memory; a last
dimension that is not contiguous is copied first.

Exactness. A row stays in registers: its mean is refined by the mean of what is left after subtracting it, and
the variance is the centred one, corrected (Chan, Golub and LeVeque, 1983), so a large mean does not cancel.

Launches. Forward one, backward one, and a second small one for the gradients of weight and bias. Each program
takes many rows, so that weight and bias are read, and the gradients' partial sums written, once per program and
not once per row; the partial sums are added in a fixed order. No float atomics: on one kind of card equal inputs
give equal bits.

Dtypes. Everything is converted to fp32 on load (to fp64 if one input is fp64); mean and rstd have that dtype, y
and s that of x, whatever the parameters have. Under autocast too.

Saved for backward: x (or s), mean and rstd, not y. Least traffic for N elements of b bytes: forward 2·N·b (4·N·b
with a residual), backward 3·N·b (4·N·b with grad_s), and N·b more where it also returns y again. Beside that the
kernels read weight and bias per program, and write and read again C partial sums per program and parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import backend, block_size, card, jit, on_device, tl
from mapo_kernels._pair_checks import FLOATING
from mapo_kernels._rows import accumulator, as_rows, triton_dtype


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
    return _eager_forward(x, weight, bias, eps, residual, out_dtype or x.dtype)


def layer_norm_apply(
    x: Tensor,  # what was normalised: x, or x + residual
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute y again from the saved statistics: the same bits as forward's. No autograd."""
    return _eager_apply(x, weight, bias, mean, rstd, out_dtype or x.dtype)


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
    return _eager_backward(grad_y, x, weight, bias, mean, rstd, grad_sum, with_output, with_params)
