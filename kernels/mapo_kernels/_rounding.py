"""Stochastic rounding to bf16 and fp16, in kernels and in torch: the same 16 random bits an element in both.

One of the two neighbours is taken with the probability that makes the result right in expectation. The bits
are words of Philox with the seed as key and (element // 8, tensor's number, number of the rounding) as
counter: word (element % 8) // 2, low half first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels._philox import philox_torch
from mapo_kernels._triton import jit, tl

# --- In kernels ---


@jit
def random_bits(key, tensor_id, step, first, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 bits for each of (ROWS, 256) elements from `first` on, int32."""
    counter = tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    counter = (first // 8 + counter).to(tl.uint32)
    low = (step & 0xFFFFFFFF).to(tl.uint32)
    high = (step >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, counter, tensor_id.to(tl.uint32), low, high)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, 256]).to(tl.int32)


@jit
def round_stochastically(x, random, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x, rounded to a number of DTYPE (bf16, fp16) by 16 random bits; NaN and Inf stay."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        # Both types have the same exponents: 16 bits are cut off, and a carry goes where it should.
        random = tl.where(magnitude < 0x7F7F0000, random, 0)  # nothing above the largest number but Inf
        rounded = ((bits + random) & -65536).to(tl.float32, bitcast=True)
    else:
        exponent = tl.maximum(magnitude & 0x7F800000, 0x38800000)  # subnormals lie as near as 2^-14's
        spacing = (exponent - 0x05000000).to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - (exponent - 0x05000000)).to(tl.float32, bitcast=True)
        scaled = magnitude.to(tl.float32, bitcast=True) * inverse  # < 2^11, with 13 bits behind the point
        whole = tl.floor(scaled + (random >> 3).to(tl.float32) * (1 / 8192))
        rounded = tl.minimum(whole * spacing, 65504.0)
        # The sign as a bit: −x may be 0 − x, which is not −0 at 0.
        rounded = (rounded.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0x7F800000, rounded, x)


# --- In torch ---


def random_bits_torch(
    seed: int, tensor_id: int, step: int, numel: int, device: torch.device | str = "cpu"
) -> Tensor:
    """16 bits for each element, int32."""
    counter = torch.arange(-(-numel // 8), dtype=torch.int64, device=device)
    words = torch.stack(philox_torch(seed, counter, tensor_id, step & 0xFFFFFFFF, step >> 32), 1)
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:numel].to(torch.int32)


def round_stochastically_torch(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 x, rounded to bf16 or fp16 by 16 random bits; NaN and Inf stay."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        random = torch.where(magnitude < 0x7F7F0000, random, 0)
        rounded = ((bits + random) & -65536).view(torch.float32)
    else:
        exponent = (magnitude & 0x7F800000).clamp(min=0x38800000)
        spacing = (exponent - 0x05000000).view(torch.float32)
        whole = (x.abs() / spacing + (random >> 3) / 8192).floor()
        rounded = torch.copysign((whole * spacing).clamp(max=65504.0), x)
    return torch.where(magnitude < 0x7F800000, rounded, x).to(dtype)
