"""Intervals hold at the sizes people have, by simulation; ties and identical models."""

from __future__ import annotations

import numpy as np
import pytest

from mapo_fast.score.statistics import (
    FEWEST_FOR_MEAN,
    Units,
    bootstrap,
    by_prompt,
    mean,
    sign_test,
    wilson,
    win_rate,
)

RUNS = 2000


@pytest.mark.parametrize("n", [10, 20, 30, 64, 200])
@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
def test_a_win_rates_interval_holds(n: int, rate: float) -> None:
    """With a tenth of ties the truth lies within 95 % ± 3 points of the intervals."""
    ties = 0.1
    shares = [rate - ties / 2, ties, 1 - rate - ties / 2]
    drawn = np.random.default_rng(n).multinomial(n, shares, size=RUNS)
    held = 0
    for wins, equal, _ in drawn:
        low, high = wilson((wins + equal / 2) / n, n, equal / n)
        held += low <= rate <= high
    assert abs(held / RUNS - 0.95) <= 0.03


@pytest.mark.parametrize("n", [64, 200])
def test_a_means_interval_holds_for_skewed_scores(n: int) -> None:
    random = np.random.default_rng(n)
    held = sum(
        low <= 1 <= high
        for low, high in (bootstrap(Units([*random.gamma(4, 0.25, n)], [1] * n)) for _ in range(300))
    )
    assert abs(held / 300 - 0.95) <= 0.04  # 300 runs know a coverage to 1.3 points


def test_without_ties_it_is_wilsons_interval() -> None:
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai, DasGupta 2001


def test_identical_models_give_exactly_one_half() -> None:
    scores = [0.1, 0.7, 0.3] * 5
    found = win_rate(scores, scores)
    assert (found.wins, found.ties, found.losses, found.rate, found.interval) == (0, 15, 0, 0.5, (0.5, 0.5))


def test_wins_and_half_the_ties_count() -> None:
    found = win_rate([1, 2, 3, 4], [0, 2, 4, 1])
    assert (found.wins, found.ties, found.losses, found.rate) == (2, 1, 1, 0.625)
    assert found.interval is None  # too few prompts


def test_exchanged_models_give_the_mirrored_interval() -> None:
    ours, theirs = [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [2.0, 1, 1, 4, 1, 1, 1, 9, 1, 1]
    a, b = win_rate(ours, theirs), win_rate(theirs, ours)
    assert a.interval is not None
    assert b.interval is not None
    assert a.interval == pytest.approx((1 - b.interval[1], 1 - b.interval[0]))


def test_seeds_are_averaged_within_prompts() -> None:
    units = by_prompt([1.0, 3.0, 5.0, 7.0], [4, 4, 2, 4])
    assert units == ([11.0, 5.0], [3, 1])
    assert units.means == [11 / 3, 5.0]
    assert mean(units).value == 4.0  # over images


def test_few_prompts_have_a_mean_without_an_interval() -> None:
    few, enough = FEWEST_FOR_MEAN - 1, FEWEST_FOR_MEAN
    assert mean(Units([1.0] * few, [1] * few)).interval is None
    assert mean(Units([1.0] * enough, [1] * enough)) == (1.0, (1.0, 1.0))


def test_scores_of_other_prompts_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="one for each prompt"):
        win_rate([1.0], [1.0, 2.0])


def test_the_sign_test_is_binomial() -> None:
    assert sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 1024)
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 0) == 1.0
