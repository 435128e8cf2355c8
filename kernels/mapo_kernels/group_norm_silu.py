"""Group normalisation and SiLU in two passes over x; backward from x and each group's mean and rstd alone.

    x̂ = (x − mean_group) · rstd_group            rstd = 1/√(variance + eps), variance biased
    z = x̂ · weight + bias                        per channel
    y = z · σ(z), or z without SiLU
    g = grad_y · σ(z) · (1 + z·(1 − σ(z)))        grad_y without SiLU
    grad_x      = rstd · (weight·g − mean_group(weight·g) − x̂ · mean_group(weight·g·x̂))
    grad_weight = Σ g·x̂,  grad_bias = Σ g        over samples and positions

Shapes. x is (N, C, …) with any number of positions S per channel, contiguous or with the channel innermost
(channels_last); both are walked where they lie and y and grad_x come in the same order.

Cutting. A program works on a region: some neighbouring channels of one sample × a run of positions, STEPS
tiles of CHANNELS × POSITIONS one after another. In a contiguous tensor a region is a part of a group, or
several small groups. With the channel innermost it spans whole groups, as many as start at a multiple of 8
channels and fill a power of two well: 120 of 128 lanes for groups of 10, 20, 30, 40 or 60 channels. So loads
are 16 bytes wide whatever the group's size. How a sample is cut depends on its own shape alone.

Forward. Pass 1 reads x: each lane of a tile follows its own mean and sum of squared deviations (Welford),
and the lanes are merged into one pair per group and region (Chan et al.). Pass 2 reads x again: each program
first merges the pairs of its groups in a fixed order, at most a tenth of its reads, then writes y. No
difference of large sums is taken, so a mean far from zero costs no digits.

Backward. Pass 1 reads x and grad_y and sums weight·g and weight·g·x̂ per group and region, and g and g·x̂ per
channel and region where the parameters train (a small third kernel adds these up). Pass 2 reads both again
and writes grad_x. Pass 1 can also write y. No float atomics: results are bitwise reproducible.

Dtypes. fp16, bf16, fp32, fp64; parameters may differ from x. Arithmetic and statistics are fp32, fp64 if an
input is. y is rounded once, to x's dtype; grad_x too.

Saved for backward: x, mean and rstd (N, groups). Least traffic: forward reads x and writes y; the two passes
read x twice, 1.5 × that. Backward reads x and grad_y and writes grad_x; the two passes move 5/3 × that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import backend, block_size, jit, on_device, tl

TILE = 2048
"""Elements of a tile: one 16-byte load per thread of bf16, two of fp32, with 8 warps."""
WARPS = 8
MOST_STEPS = 8
"""Most tiles per program, except to keep the number of regions per group small."""
PROGRAMS_PER_SAMPLE = 256
"""Fewer tiles per program, until a sample has about this many programs: one pair then fills any card."""
MOST_LANES = 256
"""Most channels per program where the channel is innermost."""
REGION_SHARE = 40
"""A group of L elements has at most about √(L / 40) regions: merging these, 8 bytes each, costs a program at
most a tenth of the bf16 that it reads."""
SPLIT_BLOCK = 64
"""Most regions of a group that are merged at a time."""
PARAMETER_ROWS, PARAMETER_CHANNELS = 32, 32
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- Kernels ---


@jit
def _region(  # type: ignore[no-untyped-def]
    channels,
    chunks,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    USED: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """This program's sample, chunk of positions, region within its groups, first group, and channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, SPAN) * PARTS
    sample = program // (blocks * chunks)
    if CHANNELS_LAST:  # neighbouring programs read neighbouring memory
        block = program % blocks
        chunk = program // blocks % chunks
    else:
        block = program // chunks % blocks
        chunk = program % chunks
    span = block // PARTS
    part = block % PARTS
    channel = span * SPAN + part * USED + tl.arange(0, CHANNELS)
    present = (channel < channels) & (tl.arange(0, CHANNELS) < USED)
    if PARTS > 1:
        present = present & (channel < span * SPAN + SPAN)
    return sample, chunk, part * chunks + chunk, span * (SPAN // GROUP), channel, present


@jit
def _offsets(channel, position, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Element offsets of a tile within its sample."""
    if WIDE:
        channel = channel.to(tl.int64)
        position = position.to(tl.int64)
    if CHANNELS_LAST:
        offset = channel[:, None] + position[None, :] * channels
    else:
        offset = channel[:, None] * positions + position[None, :]
    return offset


@jit
def _activation(z, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    return z * tl.sigmoid(z) if SILU else z


@jit
def _before_activation(grad, z, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of z from that of y."""
    if SILU:
        s = tl.sigmoid(z)
        grad = grad * (s * (1.0 + z * (1.0 - s)))
    return grad


@jit
def _per_channel(parameter, channel, present, DEFAULT: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """A (C,) parameter's values as a column, DEFAULT where there is no parameter."""
    if parameter is None:
        values = tl.full([channel.shape[0]], DEFAULT, ACC)
    else:
        values = tl.load(parameter + channel, mask=present, other=0.0).to(ACC)
    return values[:, None]


@jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    x,
    means,  # (N, groups, splits)
    deviations,  # (N, groups, splits): sums of squared deviations from these means
    channels,
    positions,
    chunks,
    splits,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a group
    SPAN: tl.constexpr,  # channels after which the pattern of regions repeats: whole groups
    PARTS: tl.constexpr,  # regions along a span
    USED: tl.constexpr,  # channels of a region
    GROUPS: tl.constexpr,  # power of two ≥ groups of a region
    CHANNELS: tl.constexpr,  # power of two ≥ USED
    POSITIONS: tl.constexpr,
    STEPS: tl.constexpr,
    UNIT: tl.constexpr,  # divides the innermost size: how wide loads may be
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a sample need 64 bits
):
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
    sample, chunk, split, first_group, channel, present = _region(
        channels, chunks, GROUP, SPAN, PARTS, USED, CHANNELS, CHANNELS_LAST
    )
    x += sample.to(tl.int64) * channels * positions
    first = chunk * (STEPS * POSITIONS)
    lane = tl.arange(0, POSITIONS)

    mean = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    deviation = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    number = tl.zeros([1, 1], dtype=ACC)
    for step in range(STEPS):
        position = first + step * POSITIONS + lane
        inside = present[:, None] & (position < positions)[None, :]
        offset = _offsets(channel, position, channels, positions, CHANNELS_LAST, WIDE)
        value = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
        number += 1.0
        difference = tl.where(inside, value - mean, 0.0)
        mean += difference * (1.0 / number)
        deviation += tl.where(inside, difference * (value - mean), 0.0)

    # Lanes into channels, channels into groups.
    steps = tl.minimum((positions - first - lane + POSITIONS - 1) // POSITIONS, STEPS)
    count = tl.where(present[:, None], tl.maximum(steps, 0)[None, :], 0).to(ACC)
    channel_count = tl.sum(count, axis=1)
    channel_mean = tl.sum(count * mean, axis=1) / channel_count
    distance = mean - channel_mean[:, None]
    channel_deviation = tl.sum(deviation + count * distance * distance, axis=1)
    group = first_group + tl.arange(0, GROUPS)
    member = (channel // GROUP == group[:, None]) & present[None, :]
    group_count = tl.sum(tl.where(member, channel_count[None, :], 0.0), axis=1)
    total = tl.sum(tl.where(member, (channel_count * channel_mean)[None, :], 0.0), axis=1)
    group_mean = total / group_count
    distance = channel_mean[None, :] - group_mean[:, None]
    deviations_of = channel_deviation[None, :] + channel_count[None, :] * distance * distance
    group_deviation = tl.sum(tl.where(member, deviations_of, 0.0), axis=1)
    slot = (sample * (channels // GROUP) + group).to(tl.int64) * splits + split
    tl.store(means + slot, group_mean, mask=group_count > 0)
    tl.store(deviations + slot, group_deviation, mask=group_count > 0)


@jit
def _merge_statistics(  # type: ignore[no-untyped-def]
    means,
    deviations,
    row,  # [GROUPS] indices of (sample, group)
    exists,
    positions,
    chunks,
    splits,
    eps,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    USED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """[GROUPS] mean and rstd from the regions' statistics, merged in a fixed order (Chan et al.)."""
    count = tl.zeros_like(row).to(ACC)
    mean = tl.zeros_like(count)
    deviation = tl.zeros_like(count)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        width = tl.minimum(GROUP - split // chunks * USED, USED)
        length = tl.minimum(positions - split % chunks * CHUNK, CHUNK)
        n = tl.where(split < splits, width * length, 0).to(ACC)[None, :]
        slot = row.to(tl.int64)[:, None] * splits + split[None, :]
        inside = exists[:, None] & (split < splits)[None, :]
        m = tl.load(means + slot, mask=inside, other=0.0)
        d = tl.load(deviations + slot, mask=inside, other=0.0)
        more = tl.sum(n, axis=1)
        more_mean = tl.sum(n * m, axis=1) / more
        distance = m - more_mean[:, None]
        more_deviation = tl.sum(d + n * distance * distance, axis=1)
        share = more / (count + more)
        distance = more_mean - mean
        mean += distance * share
        deviation += more_deviation + distance * distance * count * share
        count += more
    return mean, 1.0 / tl.sqrt((deviation / count + eps).to(ACC))


@jit
def _apply_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    weight,  # (C,) or None
    bias,  # (C,) or None
    mean,  # (N, groups): written from means and deviations, or read where these are None
    rstd,
    means,
    deviations,
    channels,
    positions,
    chunks,
    splits,
    eps: tl.float64,
    SILU: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEPS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
    sample, chunk, split, first_group, channel, present = _region(
        channels, chunks, GROUP, SPAN, PARTS, USED, CHANNELS, CHANNELS_LAST
    )
    groups = channels // GROUP
    if means is None:
        row = sample * groups + channel // GROUP
        m = tl.load(mean + row, mask=present, other=0.0)
        r = tl.load(rstd + row, mask=present, other=0.0)
    else:
        group = first_group + tl.arange(0, GROUPS)
        exists = (tl.arange(0, GROUPS) < SPAN // GROUP) & (group < groups)
        row = sample * groups + group
        group_mean, group_rstd = _merge_statistics(
            means, deviations, row, exists, positions, chunks, splits, eps,
            ACC, GROUP, USED, STEPS * POSITIONS, SPLITS,
        )  # fmt: skip
        if split == 0:
            tl.store(mean + row, group_mean, mask=exists)
            tl.store(rstd + row, group_rstd, mask=exists)
        member = channel // GROUP == group[:, None]
        m = tl.sum(tl.where(member, group_mean[:, None], 0.0), axis=0)
        r = tl.sum(tl.where(member, group_rstd[:, None], 0.0), axis=0)
    m = m[:, None]
    r = r[:, None]
    scale = _per_channel(weight, channel, present, 1.0, ACC)
    shift = _per_channel(bias, channel, present, 0.0, ACC)

    start = sample.to(tl.int64) * channels * positions
    x += start
    y += start
    for step in range(STEPS):
        position = (chunk * STEPS + step) * POSITIONS + tl.arange(0, POSITIONS)
        inside = present[:, None] & (position < positions)[None, :]
        offset = _offsets(channel, position, channels, positions, CHANNELS_LAST, WIDE)
        # As in the first pass of backward, so that y comes out there with the same bits.
        normed = (tl.load(x + offset, mask=inside, other=0.0).to(ACC) - m) * r
        result = _activation(normed * scale + shift, SILU)
        tl.store(y + offset, result.to(y.dtype.element_ty), mask=inside)


@jit
def _gradient_sums_kernel(  # type: ignore[no-untyped-def]
    grad_y,
    x,
    weight,
    bias,
    mean,  # (N, groups)
    rstd,
    sums,  # (N, groups, splits): Σ weight·g
    products,  # (N, groups, splits): Σ weight·g·x̂
    weight_sums,  # (N, chunks, C) or None: Σ g·x̂
    bias_sums,  # (N, chunks, C) or None: Σ g
    y,  # or None
    channels,
    positions,
    chunks,
    splits,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEPS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
    sample, chunk, split, first_group, channel, present = _region(
        channels, chunks, GROUP, SPAN, PARTS, USED, CHANNELS, CHANNELS_LAST
    )
    groups = channels // GROUP
    row = sample * groups + channel // GROUP
    m = tl.load(mean + row, mask=present, other=0.0)[:, None]
    r = tl.load(rstd + row, mask=present, other=0.0)[:, None]
    scale = _per_channel(weight, channel, present, 1.0, ACC)
    shift = _per_channel(bias, channel, present, 0.0, ACC)

    start = sample.to(tl.int64) * channels * positions
    x += start
    grad_y += start
    if y is not None:
        y += start
    sum_g = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    sum_gx = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    for step in range(STEPS):
        position = (chunk * STEPS + step) * POSITIONS + tl.arange(0, POSITIONS)
        inside = present[:, None] & (position < positions)[None, :]
        offset = _offsets(channel, position, channels, positions, CHANNELS_LAST, WIDE)
        normed = (tl.load(x + offset, mask=inside, other=0.0).to(ACC) - m) * r
        z = normed * scale + shift
        g = _before_activation(tl.load(grad_y + offset, mask=inside, other=0.0).to(ACC), z, SILU)
        if y is not None:
            tl.store(y + offset, _activation(z, SILU).to(y.dtype.element_ty), mask=inside)
        sum_g += g
        sum_gx += g * normed

    channel_g = tl.sum(sum_g, axis=1)
    channel_gx = tl.sum(sum_gx, axis=1)
    if weight_sums is not None:
        slot = (sample * chunks + chunk).to(tl.int64) * channels + channel
        tl.store(weight_sums + slot, channel_gx, mask=present)
        tl.store(bias_sums + slot, channel_g, mask=present)
    group = first_group + tl.arange(0, GROUPS)
    exists = (tl.arange(0, GROUPS) < SPAN // GROUP) & (group < groups)
    member = (channel // GROUP == group[:, None]) & present[None, :]
    scale = tl.sum(scale, axis=1)
    group_g = tl.sum(tl.where(member, (scale * channel_g)[None, :], 0.0), axis=1)
    group_gx = tl.sum(tl.where(member, (scale * channel_gx)[None, :], 0.0), axis=1)
    slot = (sample * groups + group).to(tl.int64) * splits + split
    tl.store(sums + slot, group_g, mask=exists)
    tl.store(products + slot, group_gx, mask=exists)


@jit
def _mean_of_splits(sums, row, exists, splits, size, SPLITS: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """[GROUPS] sums over the regions, added in a fixed order, divided by the group's size."""
    total = tl.zeros_like(row).to(ACC)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = exists[:, None] & (split < splits)[None, :]
        slot = row.to(tl.int64)[:, None] * splits + split[None, :]
        total += tl.sum(tl.load(sums + slot, mask=inside, other=0.0), axis=1)
    return total / size


@jit
def _input_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_y,
    x,
    weight,
    bias,
    mean,
    rstd,
    sums,
    products,
    grad_x,
    channels,
    positions,
    chunks,
    splits,
    size,  # elements of a group
    SILU: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEPS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
    sample, chunk, _, first_group, channel, present = _region(
        channels, chunks, GROUP, SPAN, PARTS, USED, CHANNELS, CHANNELS_LAST
    )
    groups = channels // GROUP
    row = sample * groups + channel // GROUP
    m = tl.load(mean + row, mask=present, other=0.0)[:, None]
    r = tl.load(rstd + row, mask=present, other=0.0)[:, None]
    scale = _per_channel(weight, channel, present, 1.0, ACC)
    shift = _per_channel(bias, channel, present, 0.0, ACC)
    group = first_group + tl.arange(0, GROUPS)
    exists = (tl.arange(0, GROUPS) < SPAN // GROUP) & (group < groups)
    member = channel // GROUP == group[:, None]
    mean_g = _mean_of_splits(sums, sample * groups + group, exists, splits, size, SPLITS, ACC)
    mean_gx = _mean_of_splits(products, sample * groups + group, exists, splits, size, SPLITS, ACC)
    mean_g = tl.sum(tl.where(member, mean_g[:, None], 0.0), axis=0)[:, None]
    mean_gx = tl.sum(tl.where(member, mean_gx[:, None], 0.0), axis=0)[:, None]

    start = sample.to(tl.int64) * channels * positions
    x += start
    grad_y += start
    grad_x += start
    for step in range(STEPS):
        position = (chunk * STEPS + step) * POSITIONS + tl.arange(0, POSITIONS)
        inside = present[:, None] & (position < positions)[None, :]
        offset = _offsets(channel, position, channels, positions, CHANNELS_LAST, WIDE)
        normed = (tl.load(x + offset, mask=inside, other=0.0).to(ACC) - m) * r
        grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(ACC)
        g = _before_activation(grad, normed * scale + shift, SILU) * scale
        result = r * (g - mean_g - normed * mean_gx)
        tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)


@jit
def _parameter_gradients_kernel(  # type: ignore[no-untyped-def]
    weight_sums,  # (rows, C)
    bias_sums,
    grad_weight,  # (C,) or None
    grad_bias,  # (C,) or None
    rows,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    for_weight = tl.zeros([ROWS, CHANNELS], dtype=weight_sums.dtype.element_ty)
    for_bias = tl.zeros([ROWS, CHANNELS], dtype=weight_sums.dtype.element_ty)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        for_weight += tl.load(weight_sums + offset, mask=inside, other=0.0)
        for_bias += tl.load(bias_sums + offset, mask=inside, other=0.0)
    if grad_weight is not None:
        total = tl.sum(for_weight, axis=0).to(grad_weight.dtype.element_ty)
        tl.store(grad_weight + channel, total, mask=channel < channels)
    if grad_bias is not None:
        total = tl.sum(for_bias, axis=0).to(grad_bias.dtype.element_ty)
        tl.store(grad_bias + channel, total, mask=channel < channels)


# --- Launchers ---


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def _channel_is_innermost(x: Tensor) -> bool:
    """channels_last, and not contiguous as well; `x` is one of the two."""
    return not x.is_contiguous()


def _ordered_like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` with its elements in the order of x's."""
    if _channel_is_innermost(x):
        return grad.movedim(1, -1).contiguous().movedim(-1, 1)
    return grad.contiguous()


class Gradients(NamedTuple):
    """What a backward pass fills; None is what nobody needs."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None
    """The forward's output, recomputed."""


class _Cut(NamedTuple):
    """How a sample is cut into regions; the names are explained at `_statistics_kernel`."""

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
    """A function of a sample's shape, memory order and dtype."""
    channels, positions = x.shape[1], x[0, 0].numel()
    group = channels // num_groups
    sample = _power_of_two(channels) * _power_of_two(positions)
    tile = block_size(TILE if acc == torch.float32 else TILE // 2, sample)
    if _channel_is_innermost(x):
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
    innermost = _channel_is_innermost(x)
    constants = {
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "GROUP": channels // num_groups,
        "SPAN": cut.span,
        "PARTS": cut.parts,
        "USED": cut.used,
        "GROUPS": _power_of_two(cut.span * num_groups // channels),
        "CHANNELS": cut.tile_channels,
        "POSITIONS": cut.tile_positions,
        "STEPS": cut.steps,
        "UNIT": math.gcd(channels if innermost else positions, 16),
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


def _split_block(splits: int) -> int:
    return min(SPLIT_BLOCK, _power_of_two(splits))


def _launch_statistics(x: Tensor, num_groups: int, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    plan = _plan(x, num_groups, acc)
    means, deviations = _partials(x, num_groups, plan.sizes[3], acc)
    _statistics_kernel[plan.grid](x, means, deviations, *plan.sizes, **plan.constants)
    return means, deviations


def _launch_apply(
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
    _apply_kernel[plan.grid](
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
        SPLITS=_split_block(plan.sizes[3]),
        **plan.constants,
    )


def _launch_backward(
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
    _gradient_sums_kernel[plan.grid](
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
    )
    if per_channel[0] is not None:
        _parameter_gradients_kernel[(-(-channels // PARAMETER_CHANNELS),)](
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
        _input_gradient_kernel[plan.grid](
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
            SPLITS=_split_block(splits),
            **plan.constants,
        )


# --- The same in plain torch ---


def _to_channels(values: Tensor, x: Tensor) -> Tensor:
    """(N, groups) or (C,) values so that they broadcast against x."""
    if values.ndim == 2:
        values = values.repeat_interleave(x.shape[1] // values.shape[1], 1)
    return values.view(-1, x.shape[1], *[1] * (x.ndim - 2))


def _eager_normed(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _to_channels(mean, x)) * _to_channels(rstd, x)


def _eager_affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = normed
    if weight is not None:
        z = z * _to_channels(weight.to(z.dtype), z)
    if bias is not None:
        z = z + _to_channels(bias.to(z.dtype), z)
    return z


def _eager_apply(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> None:
    z = _eager_affine(_eager_normed(x, mean, rstd), weight, bias)
    y.copy_(torch.nn.functional.silu(z) if silu else z)


def _eager_statistics(x: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
    groups = torch.unflatten(x.to(mean.dtype), 1, (mean.shape[1], -1))
    variance, average = torch.var_mean(groups, list(range(2, groups.ndim)), correction=0)
    mean.copy_(average)
    rstd.copy_((variance + eps).rsqrt())


def _eager_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    out: Gradients,
) -> None:
    normed = _eager_normed(x, mean, rstd)
    z = _eager_affine(normed, weight, bias)
    g = grad_y.to(mean.dtype)
    if out.y is not None:
        out.y.copy_(torch.nn.functional.silu(z) if silu else z)
    if silu:
        s = z.sigmoid()
        g = g * (s * (1 + z * (1 - s)))
    outer = [0, *range(2, x.ndim)]
    if out.weight is not None:
        out.weight.copy_((g * normed).sum(outer))
    if out.bias is not None:
        out.bias.copy_(g.sum(outer))
    if out.x is not None:
        g = _eager_affine(g, weight, None)
        means = (torch.unflatten(t, 1, (mean.shape[1], -1)).flatten(2).mean(2) for t in (g, g * normed))
        mean_g, mean_gx = (_to_channels(t, x) for t in means)
        out.x.copy_((g - mean_g - normed * mean_gx) * _to_channels(rstd, x))


# --- Without autograd, for operators that contain this one ---


def group_norm_silu_forward(
    x: Tensor,  # (N, C, …), as `walkable` returns it; here and below
    num_groups: int,
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    silu: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in `out_dtype` (x's if None), and mean and rstd, (N, groups)."""
    acc = _accumulator(x, weight, bias)
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    new = torch.empty if x.numel() else torch.zeros
    mean, rstd = (new(len(x), num_groups, dtype=acc, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean, rstd
    if backend(x.device).name == "eager":
        _eager_statistics(x, mean, rstd, eps)
        _eager_apply(x, y, weight, bias, mean, rstd, silu)
    else:
        with on_device(x):
            partials = _launch_statistics(x, num_groups, acc)
            _launch_apply(x, y, weight, bias, mean, rstd, silu, partials, eps)
    return y, mean, rstd


def group_norm_silu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return y again, from the statistics that the forward returned."""
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    if x.numel() == 0:
        return y
    if backend(x.device).name == "eager":
        _eager_apply(x, y, weight, bias, mean, rstd, silu)
    else:
        with on_device(x):
            _launch_apply(x, y, weight, bias, mean, rstd, silu)
    return y


def group_norm_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    *,
    with_input: bool = True,
    with_weight: bool = True,
    with_bias: bool = True,
    with_output: bool = False,
) -> Gradients:
    """Return the gradients asked for, and y in grad_y's dtype, written by the pass that sums."""
    new = torch.empty_like if x.numel() else torch.zeros_like
    out = Gradients(
        x=new(x) if with_input else None,
        weight=new(weight) if with_weight and weight is not None else None,
        bias=new(bias) if with_bias and bias is not None else None,
        y=new(x, dtype=grad_y.dtype) if with_output else None,
    )
    if x.numel() == 0:
        return out
    grad_y = _ordered_like(grad_y, x)
    if backend(x.device).name == "eager":
        _eager_backward(grad_y, x, weight, bias, mean, rstd, silu, out)
    else:
        with on_device(x):
            _launch_backward(grad_y, x, weight, bias, mean, rstd, silu, out)
    return out


# --- Operators ---


@torch.library.custom_op(
    "mapo::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def _group_norm_silu_op(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_forward(x, num_groups, weight, bias, eps, silu)


@_group_norm_silu_op.register_fake
def _(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = _accumulator(x, weight, bias)
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=acc) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op(
    "mapo::group_norm_silu_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool silu, "
    "bool with_input, bool with_weight, bool with_bias) -> Tensor[]",
)
def _group_norm_silu_backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    with_input: bool,
    with_weight: bool,
    with_bias: bool,
) -> list[Tensor]:
    gradients = group_norm_silu_backward(
        grad_y, x, weight, bias, mean, rstd, silu,
        with_input=with_input, with_weight=with_weight, with_bias=with_bias,
    )  # fmt: skip
    return [g for g in gradients if g is not None]


@_group_norm_silu_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    with_input: bool,
    with_weight: bool,
    with_bias: bool,
) -> list[Tensor]:
    wanted = ((with_input, x), (with_weight, weight), (with_bias, bias))
    return [torch.empty_like(t) for want, t in wanted if want and t is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    gradients = iter(_group_norm_silu_backward_op(grad_y, *ctx.saved_tensors, ctx.silu, *needs))
    grad_x, grad_weight, grad_bias = (next(gradients) if needed else None for needed in needs)
    return grad_x, None, grad_weight, grad_bias, None, None


_group_norm_silu_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public functions ---


def walkable(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or has its channel innermost, else a contiguous copy."""
    return x if x.movedim(1, -1).is_contiguous() else x.contiguous()


def check_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, prefix: str = ""
) -> None:
    """Raise ValueError or TypeError, naming the argument, where these do not fit each other."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError("x: pass a floating-point tensor of shape (N, C, ...), fp16, bf16, fp32 or fp64")
    if x.ndim < 2:
        raise ValueError(f"x: shape {tuple(x.shape)} has no channels; pass (N, C, ...)")
    if num_groups < 1 or x.shape[1] % num_groups != 0 or x.shape[1] == 0:
        raise ValueError(f"num_groups: {num_groups} groups do not divide the {x.shape[1]} channels of x")
    for name, parameter in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[1:2] or parameter.dtype not in FLOATING:
            raise ValueError(
                f"{name}: {tuple(parameter.shape)} of {parameter.dtype} does not fit x of shape "
                f"{tuple(x.shape)}; pass {x.shape[1]} floating-point numbers, or None"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name}: is on {parameter.device} but x is on {x.device}; move one of them")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:
    """SiLU of group normalisation, `F.silu(F.group_norm(x, num_groups, weight, bias, eps))`, rounded once.

    Group normalisation: Wu and He 2018, arXiv 1803.08494. Saves x and two numbers per group for backward.

    Args:
        x: (N, C, …), fp16, bf16, fp32 or fp64. Contiguous and channels_last tensors are walked where they
            lie; anything else is copied first.
        num_groups: divides C.
        weight: (C,), or None for 1; its dtype may differ from x's.
        bias: (C,), or None for 0.
        eps: added to the biased variance.
        silu: False for group normalisation alone.

    Returns:
        (N, C, …) in x's dtype, also under autocast, and in x's memory format.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_group_norm(x, num_groups, weight, bias)
    y: Tensor = _group_norm_silu_op(walkable(x), num_groups, weight, bias, float(eps), silu)[0]
    return y


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:
    """The definition of `group_norm_silu`, in fp64 throughout and differentiated by autograd. For tests."""
    groups = torch.unflatten(x.double(), 1, (num_groups, -1)).flatten(2)
    centred = groups - groups.mean(2, keepdim=True)
    variance = (centred**2).mean(2, keepdim=True)
    z = (centred / (variance + eps).sqrt()).view(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    if weight is not None:
        z = z * weight.double().view(shape)
    if bias is not None:
        z = z + bias.double().view(shape)
    y: Tensor = z * torch.sigmoid(z) if silu else z
    return y


class GroupNormSilu(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` followed by SiLU, with GroupNorm's arguments and state-dict keys."""

    def forward(self, input: Tensor) -> Tensor:
        """`group_norm_silu` of (N, C, …)."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)
