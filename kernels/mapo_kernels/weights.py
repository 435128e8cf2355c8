"""Weights of linear layers and convolutions: dense, quantised, or several in one matrix.

Quantised weights are frozen: nf4 and fp4 are dequantised by bitsandbytes to the dtype that was quantised,
int8 is CB · (SCB / 127), with one SCB per row or per group of columns, fp8 is codes · scales (fp8.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels.fp8 import from_fp8

__all__ = [
    "FrozenWeight",
    "dense_weight",
    "from_int8",
    "frozen_or_dense",
    "join_weights",
    "views_of_one",
]


class FrozenWeight(NamedTuple):
    """A quantised weight; `frozen_or_dense` makes it from a layer of bitsandbytes."""

    tensors: tuple[Tensor, ...]
    """int8: CB (N, C), or (O, C, kh, kw) of a convolution, and SCB (N,) or (N, G), see `from_int8`. nf4, fp4:
    packed, absmax, and for nested statistics, where absmax is quantised itself, the inner absmax, code and
    offset. fp8: codes (N, C) uint8 and scales (N,), see fp8.py."""
    format: str
    """`int8 N C`, `fp8 N C`, or `nf4 N C dtype blocksize nested_blocksize`, the last 0 without nested
    statistics."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C) of the weight that was quantised."""
        _, rows, columns, *_ = self.format.split()
        return int(rows), int(columns)


# --- Of a layer ---


def frozen_or_dense(layer: Any) -> Tensor | FrozenWeight:
    """The weight of a linear layer, for a `Projection`.

    Args:
        layer: `torch.nn.Linear`, bitsandbytes' `Linear4bit` or `Linear8bitLt` (told by their weight's
            `quant_state` and `SCB`), or one that has a `frozen_weight`. Ask in every forward pass: moving a
            layer replaces its tensors.

    Raises:
        ValueError: the layer is to be quantised but is not yet, or bitsandbytes has repacked it for inference
            on the CPU.
    """
    if hasattr(layer, "frozen_weight"):
        return layer.frozen_weight  # type: ignore[no-any-return]
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return _frozen_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB") and not weight.has_fp16_weights:
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        if scales is None:
            raise ValueError("layer: its weight is not quantised yet; move it with layer.to(device) first")
        return FrozenWeight((weight.data, scales), "int8 {} {}".format(*weight.shape))
    return weight  # type: ignore[no-any-return]


def _frozen_4bit(packed: Tensor, state: Any) -> FrozenWeight:
    if state is None:
        raise ValueError("layer: its weight is not quantised yet; move it with layer.to(device) first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "layer: bitsandbytes has repacked its weight for inference on the CPU; "
            "layer.state_dict() turns it back, layer.train() before the first forward pass prevents it"
        )
    rows, columns = state.shape
    dtype = str(state.dtype).removeprefix("torch.")
    outer = f"{state.quant_type} {rows} {columns} {dtype} {state.blocksize}"
    if state.state2 is None:
        return FrozenWeight((packed, state.absmax), f"{outer} 0")
    inner = state.state2
    return FrozenWeight(
        (packed, state.absmax, inner.absmax, inner.code, state.offset), f"{outer} {inner.blocksize}"
    )


# --- Dense ---


def dense_weight(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    """(N, C) in `dtype`: the weight itself where it has that dtype, else cast or dequantised."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    kind, _, _, *rest = weight.format.split()
    if kind in ("int8", "fp8"):
        codes, scales = weight.tensors
        return (from_int8 if kind == "int8" else from_fp8)(codes, scales, dtype)
    # bitsandbytes, which made this weight, has registered its operators.
    packed, absmax, *nested = weight.tensors
    stored, block, nested_block = getattr(torch, rest[0]), int(rest[1]), int(rest[2])
    if nested:
        inner, code, offset = nested
        absmax = offset + torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, inner, code, nested_block, torch.float32
        )
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block, kind, weight.shape, stored)
    return values.to(dtype)


def from_int8(
    codes: Tensor,  # (N, C) of a linear layer, (O, C, kh, kw) of a convolution; any memory format
    absmax: Tensor,  # (N,), or (N, G): one for each of G groups of neighbouring columns
    dtype: torch.dtype,
) -> Tensor:
    """codes · absmax / 127 in `dtype` and the codes' memory format, rounded once."""
    out = torch.empty_like(codes, dtype=dtype)
    groups = 1 if absmax.ndim == 1 else absmax.shape[1]
    scales = (absmax / 127).view(len(codes), groups, *[1] * (codes.ndim - 1))
    split, into = (torch.unflatten(x, 1, (groups, -1)) for x in (codes, out))
    torch.mul(split, scales, out=into)  # one pass, computed in fp32
    return out


# --- Weights in one storage ---


def views_of_one(weights: Sequence[Tensor]) -> Tensor | None:
    """The (ΣN, C) matrix whose adjacent rows the (N, C) weights are, in order; None if they are not."""
    first = weights[0]
    columns = first.shape[1]
    start = first.storage_offset()
    for weight in weights:
        if (
            weight.shape[1] != columns
            or weight.dtype != first.dtype
            or weight.stride() != (columns, 1)
            or weight.storage_offset() != start
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        start += weight.numel()
    return first.detach().as_strided((sum(len(w) for w in weights), columns), (columns, 1))


def join_weights(weights: Sequence[Tensor]) -> Tensor:
    """Move (N, C) Parameters into one (ΣN, C) matrix and return it; each is then a view of its rows.

    The Parameters stay the same objects, with their names, gradients and optimizer state.
    """
    matrix = torch.cat([weight.detach() for weight in weights])
    for weight, rows in zip(weights, matrix.split_with_sizes([len(w) for w in weights]), strict=True):
        weight.data = rows
    return matrix
