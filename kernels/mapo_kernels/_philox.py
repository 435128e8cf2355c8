"""Philox 4x32-10 in plain torch: the same bits as `tl.philox`, for the eager path and as the truth in tests.

A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four
32-bit words are a pure function of a 64-bit key and a 128-bit counter, so a random number belongs to its
(seed, tensor, element), whatever the launch, the block size or the device. In a kernel:
`tl.philox(key, c0, c1, c2, c3)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox_torch(
    key: Tensor | int,  # 64 bits: int64, negative numbers included
    c0: Tensor,  # int64 tensors in [0, 2³²), broadcast against each other
    c1: Tensor | int,
    c2: Tensor | int,
    c3: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words, int64 tensors in [0, 2³²), of the counters' broadcast shape."""
    x: list[Tensor] = [torch.as_tensor(c, dtype=torch.int64, device=c0.device) for c in (c0, c1, c2, c3)]
    k0: Tensor | int = key & _WORD
    k1: Tensor | int = (key >> 32) & _WORD
    for _ in range(ROUNDS):
        low_a, high_a = _multiply(x[0], _ROUND_A)
        low_b, high_b = _multiply(x[2], _ROUND_B)
        x = [high_b ^ x[1] ^ k0, low_b, high_a ^ x[3] ^ k1, low_a]
        k0 = (k0 + _KEY_A) & _WORD
        k1 = (k1 + _KEY_B) & _WORD
    like = x[0] + x[1] + x[2] + x[3]
    return x[0].expand_as(like), x[1].expand_as(like), x[2].expand_as(like), x[3].expand_as(like)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Low and high word of a 32 × 32-bit product; int64 keeps all 64 bits of it, the top one as its sign."""
    product = a * constant
    return product & _WORD, (product >> 32) & _WORD
