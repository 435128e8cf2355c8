"""total ← round(total + summand) in bf16, rounded stochastically: a sum of many terms stays right on average.

A sum of n similar terms in bf16, rounded to nearest, stops growing: a term below half the distance of two
numbers, 2⁻⁹ to 2⁻⁸ of the sum, is dropped each time. Of noisy terms (standard deviation = mean) 512 keep
95 to 98 % of their sum, 1,024 keep 79 % and 2,048 keep 50 %. Rounded stochastically all of it is kept on
average, with a random error, another one at each element, of 3 % of the sum at 512 and of 5 % at 2,048.

The 16 random bits of an element are a function of (seed, tensor's number, addition's number, element in
memory order), whatever the launch (`_rounding.py`); the addition's number has bit 62 set, so that they are
none of AdamW8bit's under the same seed.

Dtypes: total bf16, summand bf16, fp16 or fp32 with its elements in the same order in memory; the addition is
fp32. Least traffic: both read, the sum written: 6 bytes an element in bf16, and no more is moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels._launch import block_size, on_device
from mapo_kernels._rounding import (
    random_bits,
    random_bits_torch,
    round_stochastically,
    round_stochastically_torch,
)
from mapo_kernels._triton import jit, tl
from mapo_kernels.hardware import backend
from mapo_kernels.ops._adamw8bit_tensors import in_order, same_order

BLOCK = 2048
WARPS = 8
_OWN = 1 << 62

# --- Kernel ---


@jit(any_value=["numel", "key", "tensor_id", "number"])
def _add_rounded_kernel(  # type: ignore[no-untyped-def]
    total,
    summand,
    numel: tl.int64,
    key: tl.int64,
    tensor_id,
    number: tl.int64,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = first + local < numel
    x = tl.load(total + first + local, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(summand + first + local, mask=inside, other=0.0).to(tl.float32)
    random = random_bits(key, tensor_id, number, first, BLOCK // 256)
    rounded = round_stochastically(x, random, tl.bfloat16)
    tl.store(total + first + local, rounded.to(tl.bfloat16), mask=inside)


# --- Operator ---


@torch.library.custom_op(
    "mapo::add_rounded_",
    mutates_args=("total",),
    schema="(Tensor(a!) total, Tensor summand, int seed, int tensor_id, int number) -> ()",
)
def _add_rounded_op(total: Tensor, summand: Tensor, seed: int, tensor_id: int, number: int) -> None:
    summand = in_order(summand, total)
    if backend(total.device).name == "eager":
        x = _flat(total).float() + _flat(summand).float()
        random = random_bits_torch(seed, tensor_id, number | _OWN, x.numel(), x.device)
        _flat(total).copy_(round_stochastically_torch(x, random, total.dtype))
        return
    block = max(256, block_size(BLOCK, total.numel()))
    grid = (-(-total.numel() // block),)
    with on_device(total):
        _add_rounded_kernel[grid](
            total,
            summand,
            total.numel(),
            seed,
            tensor_id,
            number | _OWN,
            BLOCK=block,
            num_warps=WARPS,
        )


@_add_rounded_op.register_fake
def _(*_: object) -> None:
    return None


def _flat(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, as a view."""
    return x.as_strided((x.numel(),), (1,))


# --- Public ---


def add_rounded_(total: Tensor, summand: Tensor, *, seed: int, tensor_id: int, number: int) -> Tensor:
    """Add in place and round stochastically; returns `total`.

    Args:
        total: bf16, dense in memory in any order.
        summand: of the same shape, bf16, fp16 or fp32.
        seed: not negative, below 2⁶³.
        tensor_id: a number of its own for each tensor that is added to, below 2³².
        number: of this addition, below 2⁶²: with the same one the same bits are drawn.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or `total` has gaps in memory.
    """
    if total.dtype != torch.bfloat16 or summand.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"add_rounded_: {total.dtype} += {summand.dtype}; needs bf16 += bf16, fp16 or fp32")
    if total.shape != summand.shape:
        raise ValueError(f"add_rounded_: shapes {tuple(total.shape)} and {tuple(summand.shape)} differ")
    if total.numel():
        if not same_order(total, torch.empty_like(total, device="meta")):
            raise ValueError(f"add_rounded_: total has strides {total.stride()}; it must be dense in memory")
        _add_rounded_op(total, summand, seed, tensor_id, number)
    return total
