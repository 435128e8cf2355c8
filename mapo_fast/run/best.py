"""The best step of a run by its held-out pairs, kept in `best/` beside the checkpoints.

The loss of pairs can fall, and their margin grow, while images get worse. So a step counts only if the
chosen images' error has not risen from the start: the upper end of the 95 % interval of its change must be at
most `train.best_tolerance` of the start model's error. Of these steps a later one takes the place of an
earlier one only if it certainly ranks more held-out pairs right: if the 95 % interval of the difference in
preference accuracy between the two is above 0. Margin beyond what ranks a pair right is no gain, and it goes
on growing while prompts that should not change do (bench/LOG.md).

Intervals are Student's over prompts, since pairs of one prompt are not independent. Below `FEWEST` prompts
one is wider than the spread over prompts to each side, and says too little to choose by.
"""

from __future__ import annotations

import math
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_fast.run.evaluate import HeldOut, HeldOutErrors, PairedChange, accuracy, paired_change
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.students_t import half_width

FOLDER = "best"
FEWEST = next(n for n in count(2) if half_width(0.95, n - 1) / math.sqrt(n) < 1)
"""Fewest held-out prompts to choose by: the first number of them, 7, at which the interval reaches less than
one standard deviation over prompts to each side."""


class Verdict(NamedTuple):
    """An evaluation by the rule."""

    accuracy: Tensor
    """(prompts,) fp64 preference accuracy."""
    rise: PairedChange
    """Change of the chosen images' error from the start, as a share of the start model's error."""
    allowed: bool
    """Whether the rise is within the tolerance."""

    def beats(self, other: Tensor) -> bool:
        """Whether the accuracy is certainly above another (prompts,) one."""
        low = paired_change(self.accuracy, other).low
        return low is not None and low > 0


def judge(now: HeldOutErrors, start: HeldOutErrors, prompts: Tensor, tolerance: float) -> Verdict:
    """Apply the rule to one evaluation.

    Args:
        now: errors of the model as it is.
        start: errors of the start model.
        prompts: (pairs,) int64, the number of each pair's prompt.
        tolerance: largest rise, as a share of the start model's chosen error.
    """
    begun = float(start.chosen.double().mean())
    chosen = [_by_prompt(one.chosen.double().mean(dim=1) / begun, prompts) for one in (now, start)]
    rise = paired_change(*chosen)
    allowed = rise.high is not None and rise.high <= tolerance
    return Verdict(_by_prompt(accuracy(now), prompts), rise, allowed)


def _by_prompt(values: Tensor, prompts: Tensor) -> Tensor:
    """Means of (pairs,) values over the pairs of each prompt."""
    sums = torch.zeros(int(prompts.max()) + 1, dtype=values.dtype)
    ones = torch.ones_like(values)
    return sums.index_add(0, prompts, values) / sums.index_add(0, prompts, ones)


class Best:
    """The best step so far, the same in all processes."""

    def __init__(self, config: Config, held_out: HeldOut) -> None:
        """Begin without a best step.

        Args:
            config: the run's settings.
            held_out: the pairs to judge by.
        """
        self.config = config
        self.store = CheckpointStore(config.train.output / FOLDER, 1)
        self.step, self.since = 0, 0
        """The best step so far (0: none yet), and the number of evaluations since then."""
        self.accuracy: Tensor | None = None
        """(prompts,) fp64 preference accuracy of that step."""
        wanted = config.train.best and config.train.evaluate_every > 0 and bool(held_out.pairs)
        prompts = [row.prompt for row in held_out.cache.rows(held_out.pairs)] if wanted else []
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        self.prompts = torch.tensor([numbers[prompt] for prompt in prompts], dtype=torch.int64)
        self.on = held_out.cache.paired and len(numbers) >= FEWEST
        self.note = ""
        """Why there will be no best step, where one is asked for."""
        if wanted and not self.on:
            why = f"{len(numbers)} prompts are held out, and below {FEWEST} an interval says too little"
            self.note = (
                f"no best step is kept: {why if held_out.cache.paired else 'single images have no margin'}. "
                "Compare the result with its start by eye: mapo-fast evaluate --blind (docs/evaluation.md)"
            )

    def take(self, step: int, now: HeldOutErrors, start: HeldOutErrors) -> dict[str, Any] | None:
        """Judge an evaluation; what to keep of the step where it is the best so far, else None."""
        if not self.on:
            return None
        tolerance = self.config.train.best_tolerance
        verdict = judge(now, start, self.prompts, tolerance)
        before = _by_prompt(accuracy(start), self.prompts)
        if not verdict.allowed or not verdict.beats(before if self.accuracy is None else self.accuracy):
            self.since += 1
            return None
        self.accuracy, self.step, self.since = verdict.accuracy, step, 0
        gain, rise = paired_change(verdict.accuracy, before), verdict.rise
        reason = (
            f"it ranks more held-out pairs right than the start, by {gain.mean:+.3f} [{gain.low:+.3f}, "
            f"{gain.high:+.3f}], and none with at most {tolerance:.0%} more error on the chosen images has "
            f"certainly more so far; here that error has changed by {rise.mean:+.1%}, upper 95 % bound "
            f"{rise.high:+.1%}"
        )
        return {"reason": reason, "accuracy_change": gain._asdict(), "rise": rise._asdict()}

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end: `train.patience` evaluations have brought no better step."""
        return 0 < self.config.train.patience <= self.since

    @property
    def ending(self) -> str:
        """Why the run ends early."""
        best = f"step {self.step} stays the best one" if self.step else "no step was good enough"
        return f"the run ends here: {self.since} evaluations without a better step (train.patience); {best}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        accuracies = None if self.accuracy is None else self.accuracy.tolist()
        return {"step": self.step, "since": self.since, "accuracy": accuracies}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; empty for a run that began without it."""
        self.step, self.since = int(state.get("step", 0)), int(state.get("since", 0))
        accuracies = state.get("accuracy")
        self.accuracy = None if accuracies is None else torch.tensor(accuracies, dtype=torch.float64)
