"""How group normalisation's kernels are launched: how a sample is cut into regions, one program each.

A region is some neighbouring channels of one sample × a run of positions, `steps` tiles of CHANNELS ×
POSITIONS one after another. In a contiguous tensor a region is a part of a group, or several small groups.
With the channel innermost it spans whole groups, as many as start at a multiple of 8 channels and fill a
power of two well: 120 of 128 lanes for groups of 10, 20, 30, 40 or 60 channels. So loads are 16 bytes wide
whatever the group's size. How a sample is cut depends on its own shape alone.

What is compiled depends on few of the sizes: of all of SDXL's widths and buckets 12 kernels, and 7 more
where a map's size is no multiple of 8.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import block_size
from mapo_kernels._rows import triton_dtype
from mapo_kernels.ops._group_norm_kernels import (
    apply_kernel,
    gradient_sums_kernel,
    input_gradient_kernel,
    parameter_gradients_kernel,
    statistics_kernel,
)

TILE = 2048
"""Elements of a tile: one 16-byte load per thread of bf16, two of fp32, with 8 warps."""
WARPS = 8
MOST_STEPS = 8
"""Most tiles per program, except to keep the number of regions per group small."""
PROGRAMS_PER_SAMPLE = 256
"""Fewer tiles per program, until a sample has about this many programs: one pair then fills any card."""
MOST_LANES = 256
"""Most channels per program where the channel is innermost."""
MOST_GROUPS = 16
"""Groups that a program has room for where the channel is innermost; of 10 channels 12 fill 120 lanes."""
REGION_SHARE = 40
"""A group of L elements has at most about √(L / 40) regions: merging these, 8 bytes each, costs a program at
most a tenth of the bf16 that it reads."""
SPLIT_BLOCK = 64
"""Regions of a group that are merged at a time, half as many for each of MOST_GROUPS groups."""
PARAMETER_ROWS, PARAMETER_CHANNELS = 32, 32


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def channel_is_innermost(x: Tensor) -> bool:
    """channels_last, and not contiguous as well; `x` is one of the two."""
    return not x.is_contiguous()


def ordered_like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` with its elements in the order of x's."""
    if channel_is_innermost(x):
        return grad.movedim(1, -1).contiguous().movedim(-1, 1)
    return grad.contiguous()


class Gradients(NamedTuple):
    """Results that a backward pass fills; None for those that are not needed."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None
    """The forward's output, recomputed."""


class _Cut(NamedTuple):
    """How a sample is cut into regions; the names are explained at `statistics_kernel`."""

    span: int
    parts: int
    used: int
    tile_channels: int
    tile_positions: int
    steps: int
    blocks: int
    chunks: int


def _span(group: int) -> int:
    """Channels of whole groups that a program takes where the channel is innermost.

    A multiple of 8 keeps every region's first channel on 16 bytes. Half of MOST_LANES is enough, except for
    groups that would fill these badly, such as groups of 80 channels.
    """
    aligned = math.lcm(group, 8)
    narrow, wide = (lanes // aligned * aligned for lanes in (MOST_LANES // 2, MOST_LANES))
    return max(wide if wide > 2 * narrow else narrow, group)


def _cut(x: Tensor, num_groups: int, acc: torch.dtype) -> _Cut:
    """How to cut a sample; depends on its shape, memory order and dtype only."""
    channels, positions = x.shape[1], x[0, 0].numel()
    group = channels // num_groups
    sample = _power_of_two(channels) * _power_of_two(positions)
    tile = block_size(TILE if acc == torch.float32 else TILE // 4, sample)  # fp64 would spill
    if channel_is_innermost(x):
        span, lanes = min(_span(group), channels), MOST_LANES
        tile_positions = min(_power_of_two(positions), max(1, tile // _power_of_two(min(span, lanes))))
    else:
        tile_positions = min(_power_of_two(positions), tile // min(group & -group, 4))
        lanes = tile // tile_positions
        span = min(max(1, lanes // group) * group, channels)
    used = min(span, lanes)
    parts = -(-span // used)
    tiles = -(-positions // tile_positions)
    most_chunks = max(1, math.isqrt(group * positions // REGION_SHARE) // parts)
    steps = max(1, min(MOST_STEPS, channels * positions // (tile * PROGRAMS_PER_SAMPLE)))
    steps = max(1 << (steps.bit_length() - 1), _power_of_two(-(-tiles // most_chunks)))
    steps = min(steps, _power_of_two(tiles))
    blocks = -(-channels // span) * parts
    return _Cut(span, parts, used, _power_of_two(used), tile_positions, steps, blocks, -(-tiles // steps))


class _Plan(NamedTuple):
    """What the launches of one call share."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int]  # channels, positions, chunks per sample, regions per group
    constants: dict[str, Any]


def _plan(x: Tensor, num_groups: int, acc: torch.dtype) -> _Plan:
    channels, positions = x.shape[1], x[0, 0].numel()
    cut = _cut(x, num_groups, acc)
    innermost = channel_is_innermost(x)
    constants = {
        "group_size": channels // num_groups,
        "span_size": cut.span,
        "parts": cut.parts,
        "used": cut.used,
        "steps": cut.steps,
        "ACC": triton_dtype(acc),
        "GROUPS": max(MOST_GROUPS if innermost else 1, _power_of_two(cut.span * num_groups // channels)),
        "CHANNELS": cut.tile_channels,
        "POSITIONS": cut.tile_positions,
        "UNIT": math.gcd(
            16 // x.element_size(), *((channels, cut.span, cut.used) if innermost else (positions,))
        ),
        "CHANNELS_LAST": innermost,
        "WIDE": (channels + cut.tile_channels) * (positions + cut.tile_positions * cut.steps) >= 2**31,
        "num_warps": WARPS,
        "enable_fp_fusion": True,  # its default differs between Triton versions
    }
    sizes = (channels, positions, cut.chunks, cut.parts * cut.chunks)
    return _Plan((len(x) * cut.blocks * cut.chunks,), sizes, constants)


def _partials(x: Tensor, num_groups: int, splits: int, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for two numbers per group and region."""
    both = torch.empty(2, len(x), num_groups, splits, dtype=acc, device=x.device)
    return both[0], both[1]


def _split_block(x: Tensor) -> int:
    return SPLIT_BLOCK // 2 if channel_is_innermost(x) else SPLIT_BLOCK


def launch_statistics(x: Tensor, num_groups: int, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    plan = _plan(x, num_groups, acc)
    means, deviations = _partials(x, num_groups, plan.sizes[3], acc)
    statistics_kernel[plan.grid](x, means, deviations, *plan.sizes, **plan.constants)
    return means, deviations


def launch_apply(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    partials: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Fill y from mean and rstd; from the regions' statistics if they are given, then mean and rstd too."""
    plan = _plan(x, mean.shape[1], mean.dtype)
    apply_kernel[plan.grid](
        x,
        y,
        weight,
        bias,
        mean,
        rstd,
        *(partials or (None, None)),
        *plan.sizes,
        eps,
        SILU=silu,
        SPLITS=_split_block(x),
        **plan.constants,
    )


def launch_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    out: Gradients,
) -> None:
    num_groups, acc = mean.shape[1], mean.dtype
    plan = _plan(x, num_groups, acc)
    channels, _, chunks, splits = plan.sizes
    partials = _partials(x, num_groups, splits, acc)
    per_channel: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if out.weight is not None or out.bias is not None:
        both = torch.empty(2, len(x) * chunks, channels, dtype=acc, device=x.device)
        per_channel = (both[0], both[1])
    gradient_sums_kernel[plan.grid](
        grad_y,
        x,
        weight,
        bias,
        mean,
        rstd,
        *partials,
        *per_channel,
        out.y,
        *plan.sizes,
        SILU=silu,
        **plan.constants,
        # Of its own accord ptxas stops at 80 registers for some widths, and spills.
        maxnreg=96 if plan.constants["CHANNELS_LAST"] and acc == torch.float32 else None,
    )
    if per_channel[0] is not None:
        parameter_gradients_kernel[(-(-channels // PARAMETER_CHANNELS),)](
            *per_channel,
            out.weight,
            out.bias,
            len(x) * chunks,
            channels,
            ROWS=PARAMETER_ROWS,
            CHANNELS=PARAMETER_CHANNELS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    if out.x is not None:
        input_gradient_kernel[plan.grid](
            grad_y,
            x,
            weight,
            bias,
            mean,
            rstd,
            *partials,
            out.x,
            *plan.sizes,
            x[0].numel() // num_groups,
            SILU=silu,
            SPLITS=_split_block(x),
            **plan.constants,
        )
