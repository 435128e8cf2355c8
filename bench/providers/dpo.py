"""Diffusion-DPO in this engine, for what MaPO saves by having no reference model.

`dpo_lora` takes the UNet without its adapters as the reference, `dpo_full` a frozen second UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.providers.base import Objective
from bench.providers.engine import MapoFast
from bench.providers.task import Task, load_unet
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.fuse import patch_unet
from mapo_kernels import PairedLoss, paired_loss

BETA = 5000.0


class _DpoLoss:
    """−logσ(u) against reference errors that are set before each call."""

    reference: tuple[Tensor, Tensor]

    def __call__(self, prediction: Tensor, target: Tensor) -> PairedLoss:
        return paired_loss(prediction, target, objective="dpo", beta=BETA, reference_errors=self.reference)


class _Dpo(MapoFast):
    """The engine with a reference's errors before each forward pass."""

    objective: ClassVar[Objective] = "dpo"
    differences: Sequence[str] = ("Diffusion-DPO: a reference model's errors for every step",)

    def loss(self) -> Any:
        """Holds the reference errors of the step."""
        self.dpo = _DpoLoss()
        return self.dpo

    def accumulate(self, inputs: PairInputs) -> Tensor:
        """The reference first, without gradients."""
        with torch.no_grad(), self.engine.precision.context(self.task.device):
            prediction = self.reference(inputs)
        errors = (prediction.float() - inputs.target.float()).square().flatten(1).mean(1)
        self.dpo.reference = tuple(errors.chunk(2))  # type: ignore[assignment]
        return super().accumulate(inputs)

    def reference(self, inputs: PairInputs) -> Tensor:
        """The reference's prediction."""
        raise NotImplementedError


class DpoLora(_Dpo):
    """The reference is the UNet without its adapters."""

    name: ClassVar[str] = "dpo_lora"

    def reference(self, inputs: PairInputs) -> Tensor:
        """Adapters off, on again."""
        self.unet.disable_adapters()
        try:
            return predict(self.unet, inputs)
        finally:
            self.unet.enable_adapters()


class DpoFull(_Dpo):
    """The reference is a second, frozen UNet."""

    name: ClassVar[str] = "dpo_full"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.second = load_unet(task, self.arithmetic.weights).requires_grad_(False)
        if task.device.type == "cuda":
            patch_unet(self.second)

    @property
    def forwards(self) -> Sequence[torch.nn.Module]:
        """Both UNets."""
        return self.unet, self.second

    def reference(self, inputs: PairInputs) -> Tensor:
        """The second UNet's."""
        return predict(self.second, inputs)
