"""Draws depend on (seed, epoch, pair id) and nothing else, and follow their distributions."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch

from mapo_fast.engine.draws import (
    EpochOrder,
    pair_drop,
    pair_flip,
    pair_noise,
    pair_timestep,
    stratified_timesteps,
)

IDS = [f"{i:032x}" for i in range(4000)]


def test_noise_is_a_function_of_its_key() -> None:
    first = pair_noise(0, 1, IDS[0], (4, 8, 8))
    pair_noise(0, 1, IDS[1], (4, 8, 8))
    assert torch.equal(first, pair_noise(0, 1, IDS[0], (4, 8, 8)))
    others = [
        pair_noise(1, 1, IDS[0], (4, 8, 8)),
        pair_noise(0, 2, IDS[0], (4, 8, 8)),
        pair_noise(0, 1, IDS[1], (4, 8, 8)),
        pair_noise(0, 1, IDS[0], (4, 8, 8), draw=1),
    ]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.slow
def test_noise_is_the_same_in_another_process() -> None:
    code = "from mapo_fast.engine.draws import pair_noise; print(pair_noise(3, 4, 'ab', (5,)).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(pair_noise(3, 4, "ab", (5,)).tolist())


def test_noise_is_standard_normal() -> None:
    values = torch.cat([pair_noise(0, 0, i, (64,)) for i in IDS]).double()
    n = len(values)
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_timesteps_are_uniform_and_in_range() -> None:
    steps = torch.tensor([pair_timestep(0, 0, i, 1000) for i in IDS])
    assert steps.min() >= 0
    assert steps.max() <= 999
    counts = torch.bincount(steps // 100, minlength=10).double()
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


def test_each_stratum_is_drawn_once() -> None:
    for pair in IDS[:50]:
        steps = stratified_timesteps(0, "held-out", pair, 1000, 8)
        assert [s // 125 for s in steps] == list(range(8))


def test_flips_and_drops_have_their_rates_and_do_not_move_each_other() -> None:
    flips = sum(pair_flip(0, 0, i) for i in IDS) / len(IDS)
    drops = [pair_drop(0, 0, i, 0.1) for i in IDS]
    assert abs(flips - 0.5) < 4 * 0.5 / math.sqrt(len(IDS))
    assert abs(sum(drops) / len(IDS) - 0.1) < 4 * 0.3 / math.sqrt(len(IDS))
    assert not any(pair_drop(0, 0, i, 0.0) for i in IDS)
    assert all(pair_drop(0, 0, i, 1.0) for i in IDS)


def test_seed_zero_is_a_seed() -> None:
    assert order(50) != order(50, seed=1)
    assert order(50) != order(50, epoch=1)


def order(count: int, seed: int = 0, epoch: int = 0) -> list[int]:
    found = EpochOrder(seed, epoch, "x", count)
    return [found[i] for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [*range(1, 30), 997, 1024, 5000])
def test_an_epochs_order_is_a_permutation(count: int) -> None:
    assert sorted(order(count)) == list(range(count))


def test_all_orders_of_few_are_equally_likely() -> None:
    seeds = 4800
    found = Counter(tuple(order(4, seed=seed)) for seed in range(seeds))
    assert len(found) == 24
    chi_squared = sum((n - seeds / 24) ** 2 for n in found.values()) / (seeds / 24)
    assert chi_squared < 49.7, "one in a thousand, for 23 degrees of freedom"


def test_neighbours_part_in_an_order_of_many() -> None:
    """Places of a shuffle's first two, over seeds: each uniform, and independent of the other."""
    count, seeds = 10**7, 2000
    cells: Counter[tuple[int, int]] = Counter()
    for seed in range(seeds):
        shuffled = EpochOrder(seed, 0, "x", count)
        cells[shuffled[0] * 5 // count, shuffled[1] * 5 // count] += 1
    chi_squared = sum((cells[i, j] - seeds / 25) ** 2 for i in range(5) for j in range(5)) / (seeds / 25)
    assert chi_squared < 51.2, "one in a thousand, for 24 degrees of freedom"


def test_there_is_no_place_beyond_an_order() -> None:
    for place in (-1, 50):
        with pytest.raises(IndexError):
            EpochOrder(0, 0, "x", 50)[place]
