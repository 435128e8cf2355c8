"""What the paired losses return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PairedLoss(NamedTuple):
    """Loss and diagnostics of a batch of B pairs, on the inputs' device; fp64 if an input is, else fp32."""

    loss: Tensor
    """() for `reduction="mean"`, (B,) for `"none"`; the only output that carries a gradient."""
    chosen_error: Tensor
    """(B,) mean squared error of the chosen samples, e_w."""
    rejected_error: Tensor
    """(B,) mean squared error of the rejected samples, e_l."""
    logits: Tensor
    """(B,) the objective's logit z: the argument of logσ or of its replacement (see `objectives`)."""
    correct: Tensor
    """(B,) bool, logits > 0: the model denoises the chosen sample better than the rejected one.

    With a reference: it improved more on it. With γ (`simpo`, `cpo`): by more than γ/β. With `smpo`: on the
    sample that the label prefers.
    """
    chosen_reference_error: Tensor | None = None
    """(B,) mean squared error of the reference on the chosen samples, r_w; None without a reference."""
    rejected_reference_error: Tensor | None = None
    """(B,) the same on the rejected samples, r_l."""

    @property
    def halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Errors of the chosen and of the rejected samples, (B,) each, and how often each one counts."""
        ones = torch.ones_like(self.logits)
        return (self.chosen_error, ones), (self.rejected_error, ones)

    @property
    def pairs(self) -> float:
        """B."""
        return len(self.logits)
