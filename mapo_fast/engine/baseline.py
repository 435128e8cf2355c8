"""The baseline of Diffusion-KTO: how much the model has improved on the samples of a step, on average.

    k = max(0, mean of g = r − e over the samples of the optimizer step, of all processes)

It is a number: no gradient flows into it. With one micro-batch a step it is exactly that. A micro-batch that
is one of several cannot wait for the later ones, whose errors need forward passes of their own: it takes the
mean over the last micro-batches, itself included, as many as a step has. So at a step's last micro-batch it
is the step's own mean again, and before that the rest comes from the step before, one update older.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_fast.engine.processes import ALONE, Processes


class Baseline:
    """The mean over the last micro-batches, on the device; nothing waits for it.

    Args:
        micro_batches: that a process takes in a step.
        device: where the UNet computes.
        processes: of the run.
    """

    def __init__(self, micro_batches: int, device: torch.device, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._recent = torch.zeros(micro_batches, 2, dtype=torch.float64, device=device)
        """Sum of g and number of samples of each, of all processes; in place, as a graph's steps need it."""
        self._before = self._recent.clone()

    def begin(self) -> None:
        """A step begins."""
        self._before.copy_(self._recent)

    def drop(self) -> None:
        """Forget the micro-batches of the step that was begun."""
        self._recent.copy_(self._before)

    def __call__(self, gains: Tensor) -> Tensor:
        """Add a micro-batch's g, (n,), and return k, 0-d fp64; all processes call it together.

        What is not finite is left out: its step will be skipped, the later ones will not.
        """
        gains = gains.detach().double()
        finite = torch.isfinite(gains)
        sums = torch.stack([torch.where(finite, gains, 0.0).sum(), finite.double().sum()])
        self._recent.copy_(torch.cat([self._recent[1:], self._processes.sum_(sums)[None]]))
        total, samples = self._recent.sum(0)
        mean: Tensor = total / samples.clamp(min=1.0)
        return mean.clamp(min=0.0)

    def state(self) -> list[list[float]]:
        """For a checkpoint."""
        return self._recent.tolist()

    def restore(self, state: list[list[float]]) -> None:
        """Take over what `state` gave, also where a step had another number of micro-batches."""
        kept = torch.tensor(state, dtype=torch.float64)[-len(self._recent) :]
        self._recent.zero_()
        self._recent[-len(kept) :] = kept
