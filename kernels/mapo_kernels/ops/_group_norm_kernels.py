"""The kernels of group normalisation with SiLU; what they compute is in `group_norm_silu.py`.

A program works on one region of a sample, as `_group_norm_launch.py` cuts it.

Forward. Pass 1 reads x: each lane of a tile follows its own mean and sum of squared deviations (Welford),
and the lanes are merged into one pair per group and region (Chan et al.). Pass 2 reads x again: each program
first merges the pairs of its groups in a fixed order, at most a tenth of its reads, then writes y. No
difference of large sums is taken, so a mean far from zero costs no digits.

Backward. Pass 1 reads x and grad_y and sums weight·g and weight·g·x̂ per group and region, and g and g·x̂ per
channel and region where the parameters train (a small third kernel adds these up). Pass 2 reads both again
and writes grad_x. Pass 1 can also write y. No float atomics: results are bitwise reproducible.
"""

from __future__ import annotations

from mapo_kernels._triton import jit, tl

SIZES = ("channels", "positions", "chunks", "splits", "group_size", "span_size", "parts", "used", "steps")
"""Sizes that nothing is specialised on: all buckets and widths share the compiled kernels.

The divisor that wide loads need is in UNIT."""


@jit
def _region(  # type: ignore[no-untyped-def]
    channels,
    positions,
    chunks,
    group_size,
    span_size,
    parts,
    used,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """This program's sample, chunk of positions, region within its groups, first group, and channels.

    The sizes come first, the innermost as a multiple of UNIT that the compiler sees: loads may be as wide.
    """
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
        span_size = span_size // UNIT * UNIT
        used = used // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, span_size) * parts
    sample = program // (blocks * chunks)
    if CHANNELS_LAST:  # neighbouring programs read neighbouring memory
        block = program % blocks
        chunk = program // blocks % chunks
    else:
        block = program // chunks % blocks
        chunk = program % chunks
    span = block // parts
    part = block % parts
    channel = span * span_size + part * used + tl.arange(0, CHANNELS)
    present = (channel < channels) & (tl.arange(0, CHANNELS) < used)
    present = present & (channel < span * span_size + span_size)
    split = part * chunks + chunk
    return channels, positions, sample, chunk, split, span * (span_size // group_size), channel, present


@jit
def _tile(  # type: ignore[no-untyped-def]
    first,  # position
    channel,
    present,
    channels,
    positions,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Element offsets of a tile within its sample, and which of them are in it."""
    position = first + tl.arange(0, POSITIONS)
    inside = present[:, None] & (position < positions)[None, :]
    if WIDE:
        channel = channel.to(tl.int64)
        position = position.to(tl.int64)
    if CHANNELS_LAST:
        offset = channel[:, None] + position[None, :] * channels
    else:
        offset = channel[:, None] * positions + position[None, :]
    return offset, inside


@jit
def _groups(channels, first_group, group_size, span_size, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The groups of a region, and which of them exist."""
    group = first_group + tl.arange(0, GROUPS)
    return group, (tl.arange(0, GROUPS) < span_size // group_size) & (group < channels // group_size)


@jit
def _members(channel, group, group_size):  # type: ignore[no-untyped-def]
    """Which channels are a group's, [GROUPS, CHANNELS]."""
    return channel // group_size == group[:, None]


@jit
def _of_groups(values, member):  # type: ignore[no-untyped-def]
    """[GROUPS] sums of a value per channel."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@jit
def _to_channels(values, member):  # type: ignore[no-untyped-def]
    """A value per group as a column of its channels."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)[:, None]


@jit
def _normed(x, offset, inside, mean, rstd, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """x̂, in every kernel by the same operations: y made again in backward has the bits of forward's."""
    return (tl.load(x + offset, mask=inside, other=0.0).to(ACC) - mean) * rstd


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


@jit(any_value=SIZES)
def statistics_kernel(  # type: ignore[no-untyped-def]
    x,
    means,  # (N, groups, splits)
    deviations,  # (N, groups, splits): sums of squared deviations from these means
    channels,
    positions,
    chunks,
    splits,
    group_size,  # channels of a group
    span_size,  # channels after which the pattern of regions repeats: whole groups
    parts,  # regions along a span
    used,  # channels of a region
    steps,  # tiles of a region
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two ≥ groups of a region
    CHANNELS: tl.constexpr,  # power of two ≥ used
    POSITIONS: tl.constexpr,
    UNIT: tl.constexpr,  # divides the innermost size: how wide loads may be
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a sample need 64 bits
):
    channels, positions, sample, chunk, split, first_group, channel, present = _region(
        channels, positions, chunks, group_size, span_size, parts, used, CHANNELS, UNIT, CHANNELS_LAST
    )
    x += sample.to(tl.int64) * channels * positions
    first = chunk * (steps * POSITIONS)

    mean = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    deviation = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    number = tl.zeros([1, 1], dtype=ACC)
    for step in range(steps):
        offset, inside = _tile(
            first + step * POSITIONS, channel, present, channels, positions, POSITIONS, CHANNELS_LAST, WIDE
        )
        value = tl.load(x + offset, mask=inside, other=0.0).to(ACC)
        number += 1.0
        difference = tl.where(inside, value - mean, 0.0)
        mean += difference * (1.0 / number)
        deviation += tl.where(inside, difference * (value - mean), 0.0)

    # Lanes into channels, channels into groups.
    done = tl.minimum((positions - first - tl.arange(0, POSITIONS) + POSITIONS - 1) // POSITIONS, steps)
    count = tl.where(present[:, None], tl.maximum(done, 0)[None, :], 0).to(ACC)
    channel_count = tl.sum(count, axis=1)
    channel_mean = tl.sum(count * mean, axis=1) / channel_count
    distance = mean - channel_mean[:, None]
    channel_deviation = tl.sum(deviation + count * distance * distance, axis=1)
    group = first_group + tl.arange(0, GROUPS)
    member = _members(channel, group, group_size) & present[None, :]
    group_count = _of_groups(channel_count, member)
    group_mean = _of_groups(channel_count * channel_mean, member) / group_count
    distance = channel_mean[None, :] - group_mean[:, None]
    deviations_of = channel_deviation[None, :] + channel_count[None, :] * distance * distance
    group_deviation = tl.sum(tl.where(member, deviations_of, 0.0), axis=1)
    slot = (sample * (channels // group_size) + group).to(tl.int64) * splits + split
    tl.store(means + slot, group_mean, mask=group_count > 0)
    tl.store(deviations + slot, group_deviation, mask=group_count > 0)


@jit
def _load_statistics(mean, rstd, sample, channels, channel, present, group_size):  # type: ignore[no-untyped-def]
    """Mean and rstd of the channels' groups, as columns."""
    row = sample * (channels // group_size) + channel // group_size
    m = tl.load(mean + row, mask=present, other=0.0)
    r = tl.load(rstd + row, mask=present, other=0.0)
    return m[:, None], r[:, None]


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
    group_size,
    used,
    chunk_size,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """[GROUPS] mean and rstd from the regions' statistics, merged in a fixed order (Chan et al.)."""
    count = tl.zeros_like(row).to(ACC)
    mean = tl.zeros_like(count)
    deviation = tl.zeros_like(count)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        width = tl.minimum(group_size - split // chunks * used, used)
        length = tl.minimum(positions - split % chunks * chunk_size, chunk_size)
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


@jit(any_value=SIZES)
def apply_kernel(  # type: ignore[no-untyped-def]
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
    group_size,
    span_size,
    parts,
    used,
    steps,
    SILU: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels, positions, sample, chunk, split, first_group, channel, present = _region(
        channels, positions, chunks, group_size, span_size, parts, used, CHANNELS, UNIT, CHANNELS_LAST
    )
    if means is None:
        m, r = _load_statistics(mean, rstd, sample, channels, channel, present, group_size)
    else:
        group, exists = _groups(channels, first_group, group_size, span_size, GROUPS)
        row = sample * (channels // group_size) + group
        group_mean, group_rstd = _merge_statistics(
            means, deviations, row, exists, positions, chunks, splits, eps,
            group_size, used, steps * POSITIONS, ACC, SPLITS,
        )  # fmt: skip
        if split == 0:
            tl.store(mean + row, group_mean, mask=exists)
            tl.store(rstd + row, group_rstd, mask=exists)
        member = _members(channel, group, group_size)
        m = _to_channels(group_mean, member)
        r = _to_channels(group_rstd, member)
    scale = _per_channel(weight, channel, present, 1.0, ACC)
    shift = _per_channel(bias, channel, present, 0.0, ACC)

    start = sample.to(tl.int64) * channels * positions
    x += start
    y += start
    for step in range(steps):
        first = (chunk * steps + step) * POSITIONS
        offset, inside = _tile(first, channel, present, channels, positions, POSITIONS, CHANNELS_LAST, WIDE)
        result = _activation(_normed(x, offset, inside, m, r, ACC) * scale + shift, SILU)
        tl.store(y + offset, result.to(y.dtype.element_ty), mask=inside)


@jit(any_value=SIZES)
def gradient_sums_kernel(  # type: ignore[no-untyped-def]
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
    group_size,
    span_size,
    parts,
    used,
    steps,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels, positions, sample, chunk, split, first_group, channel, present = _region(
        channels, positions, chunks, group_size, span_size, parts, used, CHANNELS, UNIT, CHANNELS_LAST
    )
    m, r = _load_statistics(mean, rstd, sample, channels, channel, present, group_size)
    scale = _per_channel(weight, channel, present, 1.0, ACC)
    shift = _per_channel(bias, channel, present, 0.0, ACC)

    start = sample.to(tl.int64) * channels * positions
    x += start
    grad_y += start
    if y is not None:
        y += start
    sum_g = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    sum_gx = tl.zeros([CHANNELS, POSITIONS], dtype=ACC)
    for step in range(steps):
        first = (chunk * steps + step) * POSITIONS
        offset, inside = _tile(first, channel, present, channels, positions, POSITIONS, CHANNELS_LAST, WIDE)
        normed = _normed(x, offset, inside, m, r, ACC)
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
    group, exists = _groups(channels, first_group, group_size, span_size, GROUPS)
    member = _members(channel, group, group_size) & present[None, :]
    scale = tl.sum(scale, axis=1)
    group_g = _of_groups(scale * channel_g, member)
    group_gx = _of_groups(scale * channel_gx, member)
    slot = (sample * (channels // group_size) + group).to(tl.int64) * splits + split
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


@jit(any_value=(*SIZES, "size"))
def input_gradient_kernel(  # type: ignore[no-untyped-def]
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
    group_size,
    span_size,
    parts,
    used,
    steps,
    SILU: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels, positions, sample, chunk, _, first_group, channel, present = _region(
        channels, positions, chunks, group_size, span_size, parts, used, CHANNELS, UNIT, CHANNELS_LAST
    )
    m, r = _load_statistics(mean, rstd, sample, channels, channel, present, group_size)
    scale = _per_channel(weight, channel, present, 1.0, ACC)
    shift = _per_channel(bias, channel, present, 0.0, ACC)
    group, exists = _groups(channels, first_group, group_size, span_size, GROUPS)
    member = _members(channel, group, group_size)
    row = sample * (channels // group_size) + group
    mean_g = _mean_of_splits(sums, row, exists, splits, size, SPLITS, ACC)
    mean_gx = _mean_of_splits(products, row, exists, splits, size, SPLITS, ACC)
    mean_g = _to_channels(mean_g, member)
    mean_gx = _to_channels(mean_gx, member)

    start = sample.to(tl.int64) * channels * positions
    x += start
    grad_y += start
    grad_x += start
    for step in range(steps):
        first = (chunk * steps + step) * POSITIONS
        offset, inside = _tile(first, channel, present, channels, positions, POSITIONS, CHANNELS_LAST, WIDE)
        normed = _normed(x, offset, inside, m, r, ACC)
        grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(ACC)
        g = _before_activation(grad, normed * scale + shift, SILU) * scale
        result = r * (g - mean_g - normed * mean_gx)
        tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)


@jit(any_value=("rows",))
def parameter_gradients_kernel(  # type: ignore[no-untyped-def]
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
