"""bitsandbytes' 8-bit dynamic code book, and the code of a value in closed form.

The book has seven decades, (0.1, 1], (0.01, 0.1], … down to 1e-7. A decade holds twice as many values as the
one below it, in the middles of equal intervals: FINEST of them in the highest, 64 positive ones if signed,
128 if unsigned. With 0 and 1 that makes 256. Number the positive values m = n + j, with n = FINEST / 2^d of
them in decade d = 0 … 6 and j the place in it. Then the nearest value to x has the number

    m(x) = ⌊ min over decades of  n · (10^d · x + 0.8)/0.9 ⌋

because each decade is a straight line, neighbours meet at the power of ten, and the line of the lower one is
always steeper there. So a kernel searches no table: seven multiply-adds and as many comparisons. Two things
remain. At the foot of a decade the intervals grow fivefold, so the first fifth of its first interval, a line
at [2^k, 2^k + 0.2), is nearer to the value below. And 1 is not the middle of an interval: it begins halfway
from the last value.

m(x) is the nearest code, except for a few in a million values, which lie within fp32 rounding of the middle
between two, and between 0 and the smallest value (1.6e-7 … 2.8e-7), where 0 reaches a little too far.

The other way, value(m) would be the maximum of seven lines. But a table of 256 numbers in shared memory gives
bitsandbytes' own bits for two instructions instead of sixteen, and arithmetic is what the kernel is short of.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mapo_kernels._triton import jit, tl

# --- In kernels ---


@jit
def _number(y, one, FINEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number m, int32, of the value nearest to x = 0.9 y, 0 ≤ x ≤ 1; where `one` is set, that of 1.

    The lines are lowered by HALFWAY, so that fp32 is finest where most values lie, and by ½, so that rounding
    to nearest is rounding down.
    """
    HALFWAY: tl.constexpr = FINEST * 1.5
    line = y * FINEST + (FINEST * 8 / 9 - HALFWAY - 0.5)
    for d in tl.static_range(1, 7):
        line = tl.minimum(line, y * (FINEST / 2**d * 10**d) + (FINEST / 2**d * 8 / 9 - HALFWAY - 0.5))
    m = line + (HALFWAY + 0.5)
    power = (m.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    line = tl.where(m - power < 0.2, line - 0.5, line)
    line = tl.where(one, FINEST * 2 - HALFWAY, line)
    # Adding 1.5 · 2^23 leaves the nearest integer in the low bits.
    return (line + 12582912.0).to(tl.int32, bitcast=True) - (0x4B400000 - FINEST * 3 // 2)


@jit
def signed_code(y):  # type: ignore[no-untyped-def]
    """Code, int32 in [0, 255], of x = 0.9 y in [−1, 1], fp32; −1 has none and takes the one above."""
    m = _number(tl.abs(y), y >= (1 - 0.9 / 256) / 0.9, 64)
    return 127 + tl.where(y < 0, -m, m)


@jit
def unsigned_code(y):  # type: ignore[no-untyped-def]
    """Code, int32 in [0, 255], of x = 0.9 y in [0, 1], fp32."""
    return _number(y, y >= (1 - 0.9 / 512) / 0.9, 128) - 1


# --- In torch ---


@functools.cache
@_disable_current_modes()  # a fake one, or one that a planner never fills, would be kept
def code_book(signed: bool, device: torch.device) -> Tensor:
    """The 256 values in ascending order, fp32, with the bits of bitsandbytes' `create_dynamic_map`."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), device=device)


@functools.cache
@_disable_current_modes()
def both_books(device: torch.device) -> Tensor:
    """The signed and the unsigned book in one tensor, (512,)."""
    return torch.cat([code_book(True, device), code_book(False, device)])


def nearest_code(x: Tensor, signed: bool) -> Tensor:
    """uint8 codes of the values nearest to x in [−1, 1]; x is fp32 or fp64."""
    book = code_book(signed, x.device).double()
    return torch.bucketize(x.double(), (book[1:] + book[:-1]) / 2).to(torch.uint8)


@functools.cache
@_disable_current_modes()
def _cpu_table(signed: bool) -> Tensor:
    return nearest_code(torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1, signed)


def cpu_code(x: Tensor, signed: bool) -> Tensor:
    """uint8 codes as bitsandbytes ≥ 0.50 chooses them on the CPU: nearest to x rounded to 16 bits.

    Its 65,536 points from −1 to 1 have 0 between two of them: 0 becomes 1.5e-5, and smaller values are lost.
    """
    point = (x.clamp(-1, 1).nan_to_num(-1.0) + 1) * 0.5 * 65535 + 0.5
    return _cpu_table(signed)[point.to(torch.int32)]
