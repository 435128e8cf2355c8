"""Watches a run for ways in which preference training goes wrong while its loss looks fine.

MaPO's loss can fall, and its preference accuracy rise, while the model gets worse: the margin grows just as
well by making the rejected images' error larger, at the cost of the chosen ones. So the following are
watched; each is reported once, with a remedy:

- the chosen error rises above its start: on held-out pairs (paired, so a small rise shows), and on training
  pairs (noisy, since timesteps differ; the first and the last lines are compared by Welch's t);
- most pairs are saturated: the margin term −log σ(z) has the gradient −σ(−z) in the logit z, so its strength
  σ(−z) is 1 for a pair far on the wrong side, ½ at z = 0, and goes to 0 once the pair is satisfied. A small
  σ(−z) means saturated; when most pairs are, the margin no longer teaches anything;
- the predictions drift far from the start model's;
- steps are skipped because their gradients were not finite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

SATURATED_BELOW = 0.05
"""A pair counts as saturated when its margin gradient has less than this share of its full strength:
σ(−z) < 0.05, that is z > 2.94. With MaPO's default settings that is an error gap above 0.012."""

_SATURATED_SHARE = 0.8

_WINDOW = 20
"""Number of first and of last log lines that are compared; half as many for saturation."""

_TRAINING_RISE = 1.2
_TRAINING_T = 4.0
"""Threshold for t, tested at every line: t > 3 gives a false alarm in 5 to 9 % of runs of 500 lines, t > 4 in
1 %."""

_HELD_OUT_RISE = 0.05

_DRIFT = 0.05
"""Threshold for Σ‖prediction − start prediction‖² / Σ‖start prediction‖²: 22 % root mean square."""


class Monitor:
    """Turns logged figures into warnings, each condition once per run."""

    def __init__(self, warn: Callable[[int, str], None], earlier: Callable[[], str]) -> None:
        """Watch a run.

        Args:
            warn: called with step and message for each warning.
            earlier: gives the text on how to take an earlier checkpoint, as the end of a sentence.
        """
        self._warn, self._earlier = warn, earlier
        self._warned: set[str] = set()
        self._first: list[float] = []
        self._recent: list[float] = []
        self._saturated: list[float] = []

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at one logging interval's figures, named as in `log.jsonl`."""
        if (skipped := metrics.get("skipped_steps")) and skipped > 0:
            self._once(
                "skipped",
                step,
                f"{skipped:.0f} step(s) had gradients that were not finite and were skipped. If it goes on, "
                "lower optim.lr, or use train.precision = 'fp32'",
            )
        error = metrics.get("chosen_error")
        if error is not None and math.isfinite(error):
            if len(self._first) < _WINDOW:
                self._first.append(error)
            else:
                self._recent = [*self._recent, error][-_WINDOW:]
            self._check_training_error(step)
        if (saturated := metrics.get("saturated")) is not None:
            self._saturated = [*self._saturated, saturated][-_WINDOW // 2 :]
            share = statistics.fmean(self._saturated)
            if len(self._saturated) == _WINDOW // 2 and share > _SATURATED_SHARE:
                self._once(
                    "saturation",
                    step,
                    f"{share:.0%} of the pairs are saturated: their margin no longer changes the model, only "
                    "the chosen images' error does. Stop here, lower the margin's scale (objective.snr of "
                    "mapo, objective.beta of others), or use pairs that differ less",
                )

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Look at one held-out evaluation (the dict of `evaluate.compare`)."""
        change, error = figures.get("chosen_error_change"), figures.get("chosen_error")
        if error is not None and not math.isfinite(error):
            self._once(
                "non-finite",
                step,
                "the model's predictions on held-out pairs are not finite: it has diverged. Lower optim.lr, "
                "and {earlier}",
            )
        if change is not None and error is not None and change["low"] is not None:
            start = error - change["mean"]
            if change["low"] > 0 and change["mean"] > _HELD_OUT_RISE * start:
                self._rising(step, "held-out", start, error)
        drift = figures.get("drift")
        if drift is not None and drift > _DRIFT:
            self._once(
                "drift",
                step,
                f"the predictions have moved {math.sqrt(drift):.0%} (root mean square) away from the start "
                "model. Look at the previews; if other prompts suffer, lower optim.lr, train fewer steps, or "
                "{earlier}",
            )

    def _check_training_error(self, step: int) -> None:
        if len(self._recent) < _WINDOW:
            return
        before, now = statistics.fmean(self._first), statistics.fmean(self._recent)
        spread = statistics.variance(self._first) + statistics.variance(self._recent)
        noise = math.sqrt(spread / _WINDOW)
        if now > _TRAINING_RISE * before and now - before > _TRAINING_T * noise:
            self._rising(step, "training", before, now)

    def _rising(self, step: int, where: str, before: float, now: float) -> None:
        self._once(
            "chosen_error",
            step,
            f"the chosen images' error on {where} pairs rose from {before:.4f} to {now:.4f}: the margin "
            "grows at the cost of the images you prefer. Lower optim.lr or objective.beta, or {earlier}",
        )

    def _once(self, condition: str, step: int, message: str) -> None:
        if condition not in self._warned:
            self._warned.add(condition)
            self._warn(step, message.replace("{earlier}", self._earlier()))
