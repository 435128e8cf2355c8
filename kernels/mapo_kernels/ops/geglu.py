"""GEGLU: a value times the GELU of its gate, one launch each way.

    value, gate = projected[..., :F], projected[..., F:]
    out   = value · gate · Φ(gate)                          Φ(x) = (1 + erf(x/√2))/2, the exact GELU
    ∂value = grad · gate · Φ(gate)
    ∂gate  = grad · value · (Φ(gate) + gate · φ(gate))      φ(x) = exp(−x²/2)/√(2π)

Shapes. projected is (…, 2F), out is (…, F), as in diffusers' `GEGLU` (Shazeer, "GLU Variants Improve
Transformer", 2020). Rows may lie anywhere in memory, as a slice's do; a last dimension that is not contiguous
is copied first.

Dtypes. Inputs are converted to fp32 on load (fp64 stays fp64). Results are rounded once, to the dtype of
projected.

Saved for backward: projected, nothing else. Least traffic for N outputs of b bytes each: forward 3·N·b (read
2, write 1), backward 5·N·b (read 3, write 2), plus N·b where it also returns the output that forward did not
save. The kernels move exactly that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mapo_kernels._launch import block_size, on_device
from mapo_kernels._rows import FLOATING, accumulator, as_rows, triton_dtype
from mapo_kernels._triton import jit, tl
from mapo_kernels.hardware import backend

TILE = 1024
"""Outputs per program: one 16-byte access per thread and operand of bf16, two of fp32, with 4 warps."""
WIDEST = 1024
NARROWEST = 128
"""Most columns a program handles at a time, and fewest where a row has that many."""
WARPS = 4


# --- Kernels ---


@jit
def _normal(x):  # type: ignore[no-untyped-def]
    """Φ(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def _tile(rows, features, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row numbers (64 bits), columns and mask of this program's tile; `blocks` tiles lie side by side."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < features)


@jit(any_value=("rows",))
def _geglu_fwd_kernel(  # type: ignore[no-untyped-def]
    projected,  # (rows, 2F)
    out,  # (rows, F)
    rows,
    features,
    blocks,
    projected_row,  # elements between rows
    out_row,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _tile(rows, features, blocks, ROWS, BLOCK)
    source = projected + row * projected_row + column
    value = tl.load(source, mask=inside, other=0.0).to(ACC)
    gate = tl.load(source + features, mask=inside, other=0.0).to(ACC)
    result = value * (gate * _normal(gate))
    tl.store(out + row * out_row + column, result.to(out.dtype.element_ty), mask=inside)


@jit(any_value=("rows",))
def _geglu_bwd_kernel(  # type: ignore[no-untyped-def]
    projected,  # (rows, 2F)
    grad,  # (rows, F)
    grad_projected,  # (rows, 2F)
    out,  # (rows, F) or None
    rows,
    features,
    blocks,
    projected_row,
    grad_row,
    grad_projected_row,
    out_row,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _tile(rows, features, blocks, ROWS, BLOCK)
    source = projected + row * projected_row + column
    value = tl.load(source, mask=inside, other=0.0).to(ACC)
    gate = tl.load(source + features, mask=inside, other=0.0).to(ACC)
    g = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(ACC)
    normal = _normal(gate)
    gelu = gate * normal
    slope = normal + gate * (0.3989422804014327 * tl.exp(-0.5 * gate * gate))
    target = grad_projected + row * grad_projected_row + column
    tl.store(target, (g * gelu).to(grad_projected.dtype.element_ty), mask=inside)
    tl.store(target + features, (g * value * slope).to(grad_projected.dtype.element_ty), mask=inside)
    if out is not None:
        result = value * gelu
        tl.store(out + row * out_row + column, result.to(out.dtype.element_ty), mask=inside)


# --- Launchers ---


def _tiling(rows: int, features: int) -> tuple[int, int, int, int]:
    """Return (rows per tile, columns per tile, tiles per row, programs)."""
    fits = 1 << (features - 1).bit_length()
    widths = [w for w in (WIDEST >> i for i in range(16)) if w >= NARROWEST and w <= fits] or [fits]
    block = min(widths, key=lambda width: -(-features // width) * width)  # the first of equals: the widest
    height = max(1, block_size(TILE, rows * features) // block)
    blocks = -(-features // block)
    return height, block, blocks, -(-rows // height) * blocks


def _launch_forward(projected: Tensor) -> Tensor:
    features = projected.shape[-1] // 2
    out = torch.empty((*projected.shape[:-1], features), dtype=projected.dtype, device=projected.device)
    source = as_rows(projected)
    height, block, blocks, programs = _tiling(len(source), features)
    with on_device(projected):
        _geglu_fwd_kernel[(programs,)](
            source,
            out,
            len(source),
            features,
            blocks,
            source.stride(0),
            features,
            ACC=triton_dtype(accumulator(projected)),
            ROWS=height,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,  # its default differs between Triton versions
        )
    return out


def _launch_backward(projected: Tensor, grad: Tensor, with_output: bool) -> tuple[Tensor, Tensor | None]:
    features = projected.shape[-1] // 2
    grad_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    out = None
    if with_output:
        out = torch.empty(grad.shape, dtype=projected.dtype, device=projected.device)
    source, grads = as_rows(projected), as_rows(grad)
    height, block, blocks, programs = _tiling(len(source), features)
    with on_device(projected):
        _geglu_bwd_kernel[(programs,)](
            source,
            grads,
            grad_projected,
            out,
            len(source),
            features,
            blocks,
            source.stride(0),
            grads.stride(0),
            2 * features,
            features,
            ACC=triton_dtype(accumulator(projected, grad)),
            ROWS=height,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return grad_projected, out


# --- The same without Triton ---


def _eager_normal(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _eager_forward(projected: Tensor) -> Tensor:
    value, gate = projected.to(accumulator(projected)).chunk(2, dim=-1)
    return (value * (gate * _eager_normal(gate))).to(projected.dtype).contiguous()


def _eager_backward(projected: Tensor, grad: Tensor, with_output: bool) -> tuple[Tensor, Tensor | None]:
    acc = accumulator(projected, grad)
    value, gate = projected.to(acc).chunk(2, dim=-1)
    g = grad.to(acc)
    normal = _eager_normal(gate)
    gelu = gate * normal
    slope = normal + gate * (torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi))
    grad_projected = torch.cat([g * gelu, g * value * slope], dim=-1).to(projected.dtype).contiguous()
    return grad_projected, (value * gelu).to(projected.dtype).contiguous() if with_output else None


# --- Without autograd, for operators that contain this one ---


def geglu_forward(projected: Tensor) -> Tensor:
    """(…, 2F) → (…, F), contiguous. No autograd."""
    if backend(projected.device).name == "eager" or projected.numel() == 0:
        return _eager_forward(projected)
    return _launch_forward(projected)


def geglu_backward(projected: Tensor, grad: Tensor, *, with_output: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of `projected`, (…, 2F), from that of the output, (…, F); with the output again if asked for.

    One pass computes both. Both are contiguous and have projected's dtype. No autograd.
    """
    if backend(projected.device).name == "eager" or projected.numel() == 0:
        return _eager_backward(projected, grad, with_output)
    return _launch_backward(projected, grad, with_output)


# --- Operators ---


@torch.library.custom_op("mapo::geglu", mutates_args=(), schema="(Tensor projected) -> Tensor")
def _geglu_op(projected: Tensor) -> Tensor:
    return geglu_forward(projected)


@_geglu_op.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))


@torch.library.custom_op(
    "mapo::geglu_backward", mutates_args=(), schema="(Tensor projected, Tensor grad) -> Tensor"
)
def _geglu_backward_op(projected: Tensor, grad: Tensor) -> Tensor:
    return geglu_backward(projected, grad, with_output=False)[0]


@_geglu_backward_op.register_fake
def _(projected: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(projected, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (projected,) = ctx.saved_tensors
    grad_projected: Tensor = _geglu_backward_op(projected, grad)
    return grad_projected


_geglu_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public ---


def geglu(projected: Tensor) -> Tensor:
    """GEGLU of a projection: its first half times the exact GELU of its second half.

    Args:
        projected: (…, 2F), value and gate side by side in the last dimension; fp16, bf16, fp32 or fp64, any
            strides. It is all that is saved for backward.

    Returns:
        (…, F), contiguous, in the dtype of `projected`, under autocast too.

    Raises:
        TypeError, ValueError: `projected` is not a floating-point tensor with an even last dimension.
    """
    if not isinstance(projected, Tensor) or projected.dtype not in FLOATING:
        raise TypeError("projected: pass a fp16, bf16, fp32 or fp64 tensor of shape (..., 2F)")
    if projected.ndim == 0 or projected.shape[-1] % 2:
        raise ValueError(
            f"projected: shape {tuple(projected.shape)} is not (..., 2F); the last dimension holds F values, "
            "then their F gates"
        )
    out: Tensor = _geglu_op(projected)
    return out
