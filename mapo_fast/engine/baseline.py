"""The baseline of Diffusion-KTO: how much the model has improved on the samples of a step, on average.

    k = max(0, mean of g = r − e over the samples of the optimizer step, of all processes)

It is a number: no gradient flows into it. With gradient accumulation A it is a running mean over the last A
micro-batches: a micro-batch cannot wait for the later ones of its step, whose errors need forward passes of
their own. The mean is exact on a step's last micro-batch. Before that, part of it comes from the step before
and is one update old.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_fast.engine.processes import ALONE, Processes


class Baseline:
    """The mean over the last micro-batches, on the device; nothing waits for it.

    Args:
        micro_batches: micro-batches of one process in a step.
        device: where the UNet computes.
        processes: the run's processes.
    """

    def __init__(self, micro_batches: int, device: torch.device, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._recent = torch.zeros(micro_batches, 2, dtype=torch.float64, device=device)
        """Sum of g and number of samples per micro-batch, over all processes; in place for CUDA graphs."""
        self._before = self._recent.clone()

    def begin(self) -> None:
        """A step begins."""
        self._before.copy_(self._recent)

    def drop(self) -> None:
        """Forget the micro-batches of the step that was begun."""
        self._recent.copy_(self._before)

    def __call__(self, gains: Tensor) -> Tensor:
        """Add a micro-batch's g, (n,), and return k, 0-d fp64; all processes call it together.

        Values that are not finite are left out: their step is skipped, the later ones are not.
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
