"""Layer normalisation's kernels and their launchers; what they compute is in `layer_norm.py`.

Exactness. A row stays in registers. Its mean is corrected by the mean of what is left after subtracting it,
and so is the centred variance (Chan, Golub and LeVeque, 1983): a large mean does not cancel.

Launches. Forward one; backward one, and a small second one for the gradients of weight and bias. A program
takes many rows, so that weight and bias are read, and its partial sums of their gradients written, once per
program. The partial sums are added in a fixed order. No float atomics: on one kind of card equal inputs give
equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import block_size, on_device
from mapo_kernels._rows import accumulator, as_rows, triton_dtype
from mapo_kernels._triton import jit, tl
from mapo_kernels.hardware import card

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


@jit(any_value=("rows",))
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


@jit(any_value=("rows",))
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


@jit(any_value=("programs",))
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


def launch_forward(
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


def launch_backward(
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
