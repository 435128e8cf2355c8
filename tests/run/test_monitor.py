"""The monitor's warnings: each condition once, only when it holds."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from mapo_fast.run.monitor import SATURATED_BELOW, Monitor


class Recorder:
    def __init__(self) -> None:
        self.warnings: list[tuple[int, str]] = []
        self.monitor = Monitor(
            lambda step, message: self.warnings.append((step, message)), lambda: "take step 7"
        )


def test_saturated_means_a_dead_margin_gradient() -> None:
    """The bound in the docstring: z > 2.94, an error gap above 0.012 in the `code` form with its defaults."""
    assert -math.log(SATURATED_BELOW / (1 - SATURATED_BELOW)) == pytest.approx(2.94, abs=0.01)

    def score(x: float) -> float:
        return 0.5 * x / math.expm1(0.5 * x)

    assert 1000 * (score(0.1) - score(0.112)) == pytest.approx(2.94, abs=0.1)


def test_saturation_warns_once_when_it_lasts() -> None:
    recorder = Recorder()
    for step in range(9):
        recorder.monitor.step(step, {"saturated": 1.0})
    assert recorder.warnings == []
    for step in range(9, 40):
        recorder.monitor.step(step, {"saturated": 1.0})
    assert len(recorder.warnings) == 1
    assert recorder.warnings[0][0] == 9
    assert recorder.warnings[0][1].startswith("100% of the pairs are saturated")


@pytest.mark.parametrize("share", [0.0, 0.79])
def test_no_saturation_warning_below_the_threshold(share: float) -> None:
    recorder = Recorder()
    for step in range(100):
        recorder.monitor.step(step, {"saturated": share})
    assert recorder.warnings == []


def noisy(mean: float, seed: int) -> list[float]:
    """Errors as spread as those of small batches at random timesteps."""
    draws = random.Random(seed)
    return [mean * draws.lognormvariate(-0.08, 0.4) for _ in range(20)]


def test_a_rising_training_error_warns_once() -> None:
    recorder = Recorder()
    for step, error in enumerate(noisy(0.1, 0) + noisy(0.2, 1) + noisy(0.2, 2)):
        recorder.monitor.step(step, {"chosen_error": error})
    assert len(recorder.warnings) == 1
    assert "chosen images' error on training pairs rose" in recorder.warnings[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_does_not_warn(seed: int) -> None:
    recorder = Recorder()
    errors = [error for part in range(5) for error in noisy(0.1, 100 * seed + part)]
    for step, error in enumerate(errors):
        recorder.monitor.step(step, {"chosen_error": error})
    assert recorder.warnings == []


def test_errors_that_are_not_finite_are_left_out() -> None:
    recorder = Recorder()
    for step in range(100):
        recorder.monitor.step(step, {"chosen_error": math.nan if step % 2 else 0.1})
    assert recorder.warnings == []


def change(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"chosen_error": 0.1 + mean, "chosen_error_change": {"mean": mean, "low": low, "high": high}}


@pytest.mark.parametrize(
    ("figures", "warns"),
    [
        (change(0.01, 0.005, 0.015), True),
        (change(0.01, -0.001, 0.021), False),  # not significant
        (change(0.001, 0.0005, 0.0015), False),  # significant but 1 %
        (change(0.01, None, None), False),  # one pair
        (change(-0.01, -0.015, -0.005), False),
    ],
)
def test_a_rising_held_out_error(figures: dict[str, Any], warns: bool) -> None:
    recorder = Recorder()
    recorder.monitor.evaluation(100, figures)
    recorder.monitor.evaluation(200, figures)
    assert len(recorder.warnings) == warns
    if warns:
        assert "held-out pairs rose from 0.1000 to 0.1100" in recorder.warnings[0][1]


def test_drift_warns_once() -> None:
    recorder = Recorder()
    for step, drift in enumerate((0.0, 0.049, math.nan, 0.09, 0.2)):
        recorder.monitor.evaluation(step, {"drift": drift})
    assert [step for step, _ in recorder.warnings] == [3]
    assert "moved 30% (root mean square)" in recorder.warnings[0][1]


def test_skipped_steps_warn_once() -> None:
    recorder = Recorder()
    for step, skipped in enumerate((0.0, 0.0, 3.0, 5.0)):
        recorder.monitor.step(step, {"skipped_steps": skipped})
    assert [step for step, _ in recorder.warnings] == [2]
