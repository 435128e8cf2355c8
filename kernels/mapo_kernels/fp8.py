"""Matrix products in 8-bit floating point (e4m3) with a frozen weight: both operands in fp8, sums in fp32.

    y  = round(n) Wᵀ + bias           W = diag(s) C         C (N, K) codes, s (N,) scales
    dn = round(dy · s) C              round(): to codes and a scale per row, and back

Every scale is a power of two, the smallest with which a row's largest magnitude is at most 448. So a
dequantised weight is exact in bf16, dy · s is exact, and the one copy of the codes serves both products: in
dn the scales of W lie along the sum, where no product takes them, and dy carries them instead. A scale per
row also keeps samples apart: what one gives does not depend on the others of its batch.

An element that is rounded moves by at most 2⁻⁴ of itself, plus 2⁻¹⁰ scales where it is subnormal, that is
below 2⁻¹⁴ of its row's largest. A row with an infinity or a NaN has the scale NaN.

On cards from compute capability 8.9 (`in_fp8`) products are `torch.nn.functional.scaled_mm`'s with scales by
row, bf16 out of fp32 accumulators, fast accumulation: its error is far below that of the operands. It wants
the second operand by columns, hence for dn the codes are transposed first, N·K bytes read and written; a
second copy would double the weight. Elsewhere, and in fp64, the same rounded operands are multiplied in n's
dtype.

torchao is not used. Its float8 training (`Float8Linear`) keeps weights in bf16, casts them in every product
and always computes the weight's gradient; its layers that keep fp8 weights are for inference and have no
derivative (pytorch/ao issue 4376). Both are modules and tensor subclasses of their own, which the operators
here cannot contain.

Least traffic of rounding M·K values of b bytes: (b + 1)·M·K read and written; the kernel moves that.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from mapo_kernels._launch import block_size, on_device
from mapo_kernels._rows import as_rows
from mapo_kernels._triton import jit, tl
from mapo_kernels.capability import OLDEST_FP8_CAPABILITY
from mapo_kernels.hardware import backend, card

FP8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Both dimensions of a weight must be multiples of this, for `scaled_mm`."""
TILE = 4096
"""Elements a program handles at a time, 16 per thread."""
ROWS_PER_PROGRAM = 32
"""Fewest rows per program once each multiprocessor has one: factors are read once per program."""
PROGRAMS_PER_MULTIPROCESSOR = 4
LONGEST_ROW = 16384
"""Longest row that fits the registers of a program; longer ones take the plain torch path."""


class Rows(NamedTuple):
    """A rounded (M, K) matrix: codes · scales."""

    codes: Tensor
    """(M, K) uint8, the bits of e4m3."""
    scales: Tensor
    """(M,) fp32, powers of two."""


# --- Kernel ---


@jit
def _fp8_rows_kernel(  # type: ignore[no-untyped-def]
    x,  # (rows, columns)
    factors,  # (columns,) powers of two, or None
    codes,  # (rows, columns) uint8
    scales,  # (rows,)
    rows,
    columns,
    x_row,  # elements between rows
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    in_row = column < columns
    factor = tl.load(factors + column, mask=in_row, other=0.0) if factors is not None else None
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & in_row
        value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        if factor is not None:
            value *= factor
        bits = value.to(tl.int32, bitcast=True)
        largest = tl.max(bits & 0x7FFFFFFF, axis=1, keep_dims=True)  # as integers: NaN > infinity > numbers
        exponent = (largest >> 23) - 8 + tl.where((largest & 0x7FFFFF) > 0x600000, 1, 0)
        exponent = tl.maximum(exponent, 1)
        scale = tl.where(largest >= 0x7F800000, 0x7FC00000, exponent << 23).to(tl.float32, bitcast=True)
        tl.store(scales + row, scale, mask=row < rows)
        scaled = value * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        size = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 of 23 bits, to nearest even
        # Next to 2^14 fp32's spacing is e4m3's least, 2^-9: the sum rounds to it.
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
        tl.store(codes + row * columns + column, code.to(tl.uint8), mask=inside)


# --- Launcher, and the same without Triton ---


def _launch(x: Tensor, factors: Tensor | None) -> Rows:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    block = 1 << (x.shape[1] - 1).bit_length()
    height = max(1, block_size(TILE, len(x) * block) // block)
    multiprocessors = card(x.device).multiprocessors
    programs = min(
        -(-len(x) // height),
        max(multiprocessors, len(x) // ROWS_PER_PROGRAM),
        multiprocessors * PROGRAMS_PER_MULTIPROCESSOR,
    )
    with on_device(x):
        _fp8_rows_kernel[(programs,)](
            x,
            factors,
            codes,
            scales,
            len(x),
            x.shape[1],
            x.stride(0),
            ROWS=height,
            BLOCK=block,
            num_warps=min(16, max(TILE, block) // 512),
            enable_fp_fusion=True,
        )
    return Rows(codes, scales)


def to_fp8_eager(x: Tensor, factors: Tensor | None = None) -> Rows:
    """`to_fp8` in plain torch, the same bits."""
    x = x.float() if factors is None else x.float() * factors
    largest = x.abs().amax(1, keepdim=True).view(torch.int32)
    exponent = ((largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000)).clamp_min(1)
    codes = (x * ((254 - exponent) << 23).view(torch.float32)).to(FP8).view(torch.uint8)
    scales = torch.where(largest >= 0x7F800000, 0x7FC00000, exponent << 23)
    return Rows(codes, scales.to(torch.int32).view(torch.float32).squeeze(1))


# --- Without autograd, for operators that contain these ---


def in_fp8(device: torch.device) -> bool:
    """Whether products of fp8 codes run as such on the device."""
    compiled = backend(device).name == "triton" and sys.platform == "linux"
    return compiled and card(device).capability >= OLDEST_FP8_CAPABILITY


def to_fp8(x: Tensor, factors: Tensor | None = None) -> Rows:
    """Round x, or x · factors.

    Args:
        x: (M, K), fp16, bf16, fp32 or fp64; taken as fp32.
        factors: (K,) fp32, powers of two.
    """
    if backend(x.device).name == "eager" or x.numel() == 0 or x.shape[1] > LONGEST_ROW:
        return to_fp8_eager(x, factors)
    return _launch(as_rows(x), factors)


def from_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes · scales, (M, K) in `dtype`; exact in bf16 and fp32, but for what is below their normal range."""
    out = codes.view(FP8).to(dtype)
    return torch.mul(out, scales[:, None], out=out)


def fp8_product(n: Rows, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """n Wᵀ + bias, (M, N) in `dtype`."""
    if not _multiplied_in_fp8(n, weight, dtype):
        bias = None if bias is None else bias.to(dtype)
        return F.linear(from_fp8(*n, dtype), from_fp8(*weight, dtype), bias)
    found: Tensor = F.scaled_mm(
        n.codes.view(FP8),
        weight.codes.view(FP8).t(),
        n.scales[:, None],
        ScalingType.RowWise,
        weight.scales[None, :],
        ScalingType.RowWise,
        bias=None if bias is None else bias.bfloat16(),
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return found.to(dtype)


def fp8_input_gradient(dy: Tensor, weight: Rows) -> Tensor:
    """dy W, (M, K) in dy's dtype, from dy (M, N)."""
    codes, scales = weight
    across = Rows(codes.t().contiguous(), torch.ones_like(scales[:1]).expand(codes.shape[1]).contiguous())
    return fp8_product(to_fp8(dy, scales), across, None, dy.dtype)


def _multiplied_in_fp8(n: Rows, weight: Rows, dtype: torch.dtype) -> bool:
    fits = n.codes.numel() > 0 and not any(size % MULTIPLE for size in weight.codes.shape)
    return fits and dtype != torch.float64 and in_fp8(n.codes.device)
