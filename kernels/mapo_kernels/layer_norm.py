"""Layer normalisation over the last dimension, with a residual added in the same pass.

    s       = x + residual, rounded to x's dtype; x itself without a residual
    mean    = Σ s/C,   rstd = 1/√(Σ (s − mean)²/C + eps)       per row
    y       = n · weight + bias,   n = (s − mean) · rstd
    ∂s      = rstd · (g − Σ g/C − n · Σ g·n/C) + grad_s,   g = grad_y · weight;   ∂x = ∂residual = ∂s
    ∂weight = Σ grad_y · n,   ∂bias = Σ grad_y                over the rows

grad_s is the gradient that arrives at s from elsewhere: in a transformer block s is also the next residual.

Shapes. x, residual, y, s are (…, C), weight and bias (C,) or None. Rows may lie anywhere in memory; a last
dimension that is not contiguous is copied first.

Exactness. A row stays in registers. Its mean is corrected by the mean of what is left after subtracting it,
and so is the centred variance (Chan, Golub and LeVeque, 1983): a large mean does not cancel.

Launches. Forward one; backward one, and a small second one for the gradients of weight and bias. A program
takes many rows, so that weight and bias are read, and its partial sums of their gradients written, once per
program. The partial sums are added in a fixed order. No float atomics: on one kind of card equal inputs give
equal bits.

Dtypes. All is converted to fp32 on load, to fp64 if one input is fp64. mean and rstd have that dtype, y and s
that of x, whatever the parameters have, under autocast too.

Saved for backward: x (or s), mean and rstd, not y. Least traffic for N elements of b bytes: forward 2·N·b
(4·N·b with a residual), backward 3·N·b (4·N·b with grad_s), plus N·b where it also returns y again. Beside
that, the kernels read weight and bias once per program, and write and read C partial sums per program and
parameter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from mapo_kernels._launch import backend, block_size, card, jit, on_device, tl
from mapo_kernels._pair_checks import FLOATING
from mapo_kernels._rows import accumulator, as_rows, triton_dtype

FORWARD_TILE, BACKWARD_TILE = 4096, 2048
"""Elements a program handles at a time, 8 per thread: one 16-byte access of bf16, two of fp32."""
MOST_CHANNELS = 8192
"""Longest row that fits the registers of a program; longer ones take the plain torch path."""
ROWS_PER_PROGRAM = 32
"""Fewest rows per program once each multiprocessor has one: weight and bias add 1/32 to forward's bytes."""
PROGRAMS_PER_MULTIPROCESSOR = 4
SUM_ROWS = 128
SUM_COLUMNS = 16
"""Partial sums that a program adds at a time: 16 per thread with 4 warps."""


# --- Kernels ---


@jit
def _load(pointer, mask, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(pointer, mask=mask, other=0.0).to(ACC)


@jit
def _affine(n, w, b):  # type: ignore[no-untyped-def]
    """n · w + b, whichever of them there are."""
    if w is not None:
        n = n * w
    if b is not None:
        n = n + b
    return n


@jit
def _layer_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x,  # (rows, channels)
    residual,  # (rows, channels) or None
    weight,  # (channels,) or None
    bias,  # (channels,) or None
    mean,  # (rows,)
    rstd,  # (rows,)
    y,  # (rows, channels)
    summed,  # (rows, channels) or None
    rows,
    channels,
    x_row,  # elements between rows
    residual_row,
    eps: tl.float64,
    ACC: tl.constexpr,
    STATISTICS: tl.constexpr,  # compute mean and rstd; else they are read
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    in_row = column < channels
    w = _load(weight + column, in_row, ACC) if weight is not None else None
    b = _load(bias + column, in_row, ACC) if bias is not None else None
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        valid = row < rows
        inside = valid & in_row
        s = _load(x + row * x_row + column, inside, ACC)
        if residual is not None:
            s += _load(residual + row * residual_row + column, inside, ACC)
            rounded = s.to(summed.dtype.element_ty)
            tl.store(summed + row * channels + column, rounded, mask=inside)
            s = rounded.to(ACC)
        if STATISTICS:
            m = tl.sum(s, axis=1, keep_dims=True) / channels
            rest = tl.where(in_row, s - m, 0.0)
            shift = tl.sum(rest, axis=1, keep_dims=True) / channels
            variance = tl.sum(rest * rest, axis=1, keep_dims=True) / channels - shift * shift
            m += shift
            r = tl.rsqrt(variance + tl.full([1, 1], eps, ACC))
            tl.store(mean + row, m, mask=valid)
            tl.store(rstd + row, r, mask=valid)
        else:
            m = _load(mean + row, valid, ACC)
            r = _load(rstd + row, valid, ACC)
        out = _affine((s - m) * r, w, b)
        tl.store(y + row * channels + column, out.to(y.dtype.element_ty), mask=inside)


@jit
def _layer_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_y,  # (rows, channels)
    x,  # (rows, channels): what was normalised
    weight,  # (channels,) or None
    bias,  # (channels,) or None; only y needs it
    mean,  # (rows,)
    rstd,  # (rows,)
    grad_sum,  # (rows, channels) or None
    grad_x,  # (rows, channels)
    y,  # (rows, channels) or None
    partial_weight,  # (programs, channels) or None
    partial_bias,  # (programs, channels) or None
    rows,
    channels,
    grad_y_row,  # elements between rows
    x_row,
    grad_sum_row,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    in_row = column < channels
    w = _load(weight + column, in_row, ACC) if weight is not None else None
    b = _load(bias + column, in_row, ACC) if bias is not None and y is not None else None
    weight_total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    bias_total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        valid = row < rows
        inside = valid & in_row
        g = _load(grad_y + row * grad_y_row + column, inside, ACC)
        m = _load(mean + row, valid, ACC)
        r = _load(rstd + row, valid, ACC)
        n = (_load(x + row * x_row + column, inside, ACC) - m) * r
        if y is not None:
            out = _affine(n, w, b)
            tl.store(y + row * channels + column, out.to(y.dtype.element_ty), mask=inside)
        if partial_weight is not None:
            weight_total += g * n
        if partial_bias is not None:
            bias_total += g
        if w is not None:
            g *= w
        along_n = tl.sum(g * n, axis=1, keep_dims=True) / channels
        along_one = tl.sum(g, axis=1, keep_dims=True) / channels
        grad = r * (g - along_one - n * along_n)
        if grad_sum is not None:
            grad += _load(grad_sum + row * grad_sum_row + column, inside, ACC)
        tl.store(grad_x + row * channels + column, grad.to(grad_x.dtype.element_ty), mask=inside)
    target = tl.program_id(0) * channels + column
    if partial_weight is not None:
        tl.store(partial_weight + target, tl.sum(weight_total, axis=0, keep_dims=True), mask=in_row)
    if partial_bias is not None:
        tl.store(partial_bias + target, tl.sum(bias_total, axis=0, keep_dims=True), mask=in_row)


@jit
def _column_sums(  # type: ignore[no-untyped-def]
    partial, target, programs, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """target[c] = Σ_p partial[p, c], always added in the same order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_row = column < channels
    total = tl.zeros([ROWS, BLOCK], dtype=partial.dtype.element_ty)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        inside = (program < programs) & in_row
        total += tl.load(partial + program * channels + column, mask=inside, other=0.0)
    sums = tl.sum(total, axis=0, keep_dims=True)
    tl.store(target + column, sums.to(target.dtype.element_ty), mask=in_row)


@jit
def _layer_norm_params_kernel(  # type: ignore[no-untyped-def]
    partial_weight,  # (programs, channels) or None
    partial_bias,  # (programs, channels) or None
    grad_weight,  # (channels,) or None
    grad_bias,  # (channels,) or None
    programs,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if partial_weight is not None:
        _column_sums(partial_weight, grad_weight, programs, channels, ROWS, BLOCK)
    if partial_bias is not None:
        _column_sums(partial_bias, grad_bias, programs, channels, ROWS, BLOCK)


# --- Launchers ---


class _Tiling(NamedTuple):
    """How the rows are shared out."""

    height: int  # rows per tile
    block: int  # columns per tile, at least `channels`
    programs: int
    warps: int


def _tiling(rows: int, channels: int, device: torch.device, tile: int) -> _Tiling:
    block = 1 << (channels - 1).bit_length()
    height = max(1, block_size(tile, rows * block) // block)
    multiprocessors = card(device).multiprocessors
    programs = min(
        -(-rows // height),
        max(multiprocessors, rows // ROWS_PER_PROGRAM),
        multiprocessors * PROGRAMS_PER_MULTIPROCESSOR,
    )
    return _Tiling(height, block, programs, warps=min(16, max(tile, block) // 256))


def _rows_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    statistics: tuple[Tensor, Tensor] | None,  # mean and rstd if they are known
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    source = as_rows(x)
    rows, channels = source.shape
    acc = accumulator(x, weight, bias, residual, *(statistics or ()))
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = statistics or (torch.empty(rows, dtype=acc, device=x.device) for _ in range(2))
    added = _rows_or_none(residual)
    summed = None if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiling = _tiling(rows, channels, x.device, FORWARD_TILE)
    with on_device(x):
        _layer_norm_fwd_kernel[(tiling.programs,)](
            source,
            added,
            _rows_or_none(weight),
            _rows_or_none(bias),
            mean,
            rstd,
            y,
            summed,
            rows,
            channels,
            source.stride(0),
            0 if added is None else added.stride(0),
            eps,
            ACC=triton_dtype(acc),
            STATISTICS=statistics is None,
            ROWS=tiling.height,
            BLOCK=tiling.block,
            num_warps=tiling.warps,
            enable_fp_fusion=True,  # its default differs between Triton versions
        )
    return y, mean, rstd, summed


def _launch_backward(
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
    grads, source = as_rows(grad_y), as_rows(x)
    rows, channels = source.shape
    tiling = _tiling(rows, channels, x.device, BACKWARD_TILE)
    added = _rows_or_none(grad_sum)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=grad_y.dtype, device=x.device) if with_output else None

    params = (weight, bias) if with_params else (None, None)
    partial = [
        None if p is None else torch.empty(tiling.programs, channels, dtype=mean.dtype, device=x.device)
        for p in params
    ]
    grad_weight, grad_bias = (
        None if p is None else torch.empty(channels, dtype=p.dtype, device=x.device) for p in params
    )
    with on_device(x):
        _layer_norm_bwd_kernel[(tiling.programs,)](
            grads,
            source,
            _rows_or_none(weight),
            _rows_or_none(bias),
            mean,
            rstd,
            added,
            grad_x,
            y,
            *partial,
            rows,
            channels,
            grads.stride(0),
            source.stride(0),
            0 if added is None else added.stride(0),
            ACC=triton_dtype(mean.dtype),
            ROWS=tiling.height,
            BLOCK=tiling.block,
            num_warps=tiling.warps,
            enable_fp_fusion=True,
        )
        if any(p is not None for p in params):
            columns = block_size(SUM_COLUMNS, channels)
            _layer_norm_params_kernel[(-(-channels // columns),)](
                *partial,
                grad_weight,
                grad_bias,
                tiling.programs,
                channels,
                ROWS=SUM_ROWS,
                BLOCK=columns,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return grad_x, grad_weight, grad_bias, y


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
    return _launch_forward(x, weight, bias, eps, residual, out_dtype or x.dtype, None)


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
    return _launch_forward(x, weight, bias, 0.0, None, out_dtype or x.dtype, (mean, rstd))[0]


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
    run = _eager_backward if _is_eager(x) else _launch_backward
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
    _, weight, bias, *_ = ctx.saved_tensors
    with_params = any(ctx.needs_input_grad[ctx.first_param : ctx.first_param + 2])
    grad, *rest = _layer_norm_backward_op(grad_y, *ctx.saved_tensors, grad_sum, with_params)
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


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `layer_norm`, in fp64 and differentiated by autograd. Slow; for tests."""
    s = x.double()
    if residual is not None:
        exact = s + residual.double()
        s = (
            exact + (exact.to(x.dtype).double() - exact).detach()
        )  # rounded, with the gradient of the exact sum
    centred = s - s.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y if residual is None else (y, s)


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
