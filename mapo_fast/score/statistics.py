"""Win rates and means over prompts, with intervals that hold at the sizes people have.

A *unit* is a prompt: seeds of one prompt are averaged first, since they are not independent. `None` for an
interval means that there are too few prompts for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_Z = 1.959963984540054
"""Quantile of the standard normal distribution for a two-sided 95 % interval."""
FEWEST_FOR_WIN_RATE = 10
FEWEST_FOR_MEAN = 64
_RESAMPLES = 4000

Interval = tuple[float, float]


class WinRate(NamedTuple):
    """Wins of one model over another, over prompts."""

    wins: int
    ties: int
    losses: int
    rate: float
    """(wins + ½ ties) / prompts."""
    interval: Interval | None
    """95 % interval; None below `FEWEST_FOR_WIN_RATE` prompts."""


class Mean(NamedTuple):
    """A mean over prompts."""

    value: float
    interval: Interval | None
    """95 % interval; None below `FEWEST_FOR_MEAN` prompts."""


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """How often one model's prompt scores higher than another's.

    The interval is Wilson's for a mean of 0, ½ and 1. It solves (rate − w)² = z²·(w(1 − w) − ties/4n)/n
    for w, since ties take their share off the binomial variance. Without ties it is Wilson's own.

    Args:
        ours: a score for each prompt.
        theirs: the other model's, of the same prompts at the same seeds.

    Raises:
        ValueError: no prompts, or different numbers of them.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} scores: one for each prompt is needed of both")
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    ties = sum(a == b for a, b in zip(ours, theirs, strict=True))
    n = len(ours)
    rate = (wins + ties / 2) / n
    interval = wilson(rate, n, ties / n) if n >= FEWEST_FOR_WIN_RATE else None
    return WinRate(wins, ties, n - wins - ties, rate, interval)


def wilson(rate: float, n: int, ties: float = 0.0) -> Interval:
    """95 % interval of a mean of n values 0, ½ and 1, a share `ties` of which is ½."""
    spread = _Z * _Z / n
    a, b, c = 1 + spread, 2 * rate + spread, rate * rate + spread * ties / 4
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return max(0.0, (b - root) / (2 * a)), min(1.0, (b + root) / (2 * a))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of a result as uneven between equal models; ties do not count."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail) / float(2**n))


class Units(NamedTuple):
    """Scores of each prompt's images."""

    totals: list[float]
    """Sum over a prompt's images."""
    counts: list[int]

    @property
    def means(self) -> list[float]:
        """Mean score of each prompt."""
        return [total / count for total, count in zip(self.totals, self.counts, strict=True)]


def by_prompt(scores: Sequence[float], prompts: Sequence[int]) -> Units:
    """Scores of images by prompt, in the order of their first images; `prompts[i]` is image i's prompt."""
    found: dict[int, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        found.setdefault(prompt, []).append(score)
    return Units([math.fsum(one) for one in found.values()], [len(one) for one in found.values()])


def mean(units: Units) -> Mean:
    """A mean over images, with a bootstrap interval over prompts from `FEWEST_FOR_MEAN` of them on."""
    enough = len(units.counts) >= FEWEST_FOR_MEAN
    return Mean(math.fsum(units.totals) / sum(units.counts), bootstrap(units) if enough else None)


def bootstrap(units: Units) -> Interval:
    """95 % percentile interval of the mean over images; prompts are drawn, always the same ones."""
    import numpy as np  # what shows win rates only does without

    totals, counts = np.asarray(units.totals, dtype=np.float64), np.asarray(units.counts)
    random = np.random.default_rng(0)
    draws = []
    for _ in range(_RESAMPLES // 100):
        drawn = random.integers(0, len(counts), (100, len(counts)))
        draws.append(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    return float(low), float(high)
