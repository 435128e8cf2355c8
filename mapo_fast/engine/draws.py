"""Every random draw of training as a pure function of (seed, epoch, pair id).

Noise, timestep, flip and caption drop belong to the pair, not to a global random stream: they come out the
same whatever the layout, micro-batch size, objective, number of processes, or after a resume. Each purpose
has its own 128-bit key, so switching flips on does not move the noise.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def pair_noise(
    seed: int, epoch: int | str, pair_id: str, shape: tuple[int, ...], *, draw: int = 0
) -> Tensor:  # shape, fp32, CPU
    """Standard-normal noise of one pair, shared by its chosen and rejected latents.

    `epoch` is a string for draws outside training (the held-out evaluation); `draw` numbers several noises of
    one pair.
    """
    key = _key(seed, epoch, pair_id, f"noise{draw}")
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def pair_timestep(seed: int, epoch: int, pair_id: str, num_train_timesteps: int) -> int:
    """Timestep of one pair, uniform on [0, num_train_timesteps)."""
    return int(_uniform(seed, epoch, pair_id, "timestep") * num_train_timesteps)


def stratified_timesteps(
    seed: int, name: str, pair_id: str, num_train_timesteps: int, strata: int
) -> list[int]:
    """One timestep from each of `strata` equal parts of [0, num_train_timesteps)."""
    width = num_train_timesteps / strata
    return [int((i + _uniform(seed, name, pair_id, f"stratum{i}")) * width) for i in range(strata)]


def pair_flip(seed: int, epoch: int, pair_id: str) -> bool:
    """Whether both images of the pair are mirrored in this epoch."""
    return _uniform(seed, epoch, pair_id, "flip") < 0.5


def pair_drop(seed: int, epoch: int, pair_id: str, probability: float) -> bool:
    """Whether the pair's prompt is dropped, for both halves together, in this epoch."""
    return _uniform(seed, epoch, pair_id, "drop") < probability


class EpochOrder:
    """A permutation of range(count) for one epoch, of which nothing is stored: `order[i]` is computed.

    A Feistel network over pairs of digits (l, r) in base b, b² ≥ count: a round maps (l, r) to
    (r, l + F(r) mod b), which can be undone whatever F is, so that the network permutes range(b²); F is keyed
    BLAKE2. Walking on from results ≥ count until one is smaller leaves a permutation of range(count) (Black
    and Rogaway, "Ciphers with arbitrary finite domains").
    """

    ROUNDS = 8

    def __init__(self, seed: int, epoch: int, purpose: str, count: int) -> None:
        self.count, self._base = count, math.isqrt(max(0, count - 1)) + 1
        self._secret = _key(seed, epoch, "", purpose)

    def __getitem__(self, index: int) -> int:
        """The number at a place; 0 ≤ index < count.

        Raises:
            IndexError: there is no such place.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"place {index} of {self.count}")
        while True:
            left, right = divmod(index, self._base)
            for number in range(self.ROUNDS):
                left, right = right, (left + self._round(number, right)) % self._base
            index = left * self._base + right
            if index < self.count:
                return index

    def _round(self, number: int, digit: int) -> int:
        data = number.to_bytes(1, "little") + digit.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._secret).digest(), "little")


def _key(seed: int, epoch: int | str, pair_id: str, purpose: str) -> bytes:
    text = f"{seed}/{epoch}/{pair_id}/{purpose}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _uniform(seed: int, epoch: int | str, pair_id: str, purpose: str) -> float:
    """A number in [0, 1) with 53 random bits, so that rounding never gives 1."""
    return (int.from_bytes(_key(seed, epoch, pair_id, purpose)[:8], "little") >> 11) * 2.0**-53
