"""Diffusion-DPO in this engine, for what MaPO saves by having no reference model.

`dpo_lora` takes the UNet without its adapters as the reference, `dpo_full` a frozen second UNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from bench.providers.base import Objective
from bench.providers.engine import MapoFast


class DpoLora(MapoFast):
    """Diffusion-DPO of a LoRA; the reference is the UNet without its adapters."""

    name: ClassVar[str] = "dpo_lora"
    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    objective: ClassVar[Objective] = "dpo"
    changes: ClassVar[Mapping[str, Any]] = {"objective.name": "dpo", "objective.reference": "adapter"}
    differences: Sequence[str] = ("Diffusion-DPO: a reference model's errors for every step",)


class DpoFull(DpoLora):
    """Diffusion-DPO of all weights; the reference is a second, frozen UNet."""

    name: ClassVar[str] = "dpo_full"
    kinds: ClassVar[tuple[str, ...]] = ("full",)
    changes: ClassVar[Mapping[str, Any]] = {"objective.name": "dpo", "objective.reference": "copy"}

    @property
    def forwards(self) -> Sequence[torch.nn.Module]:
        """Both UNets, whose calls are the forward pass."""
        return self.unet, self.engine.parts.start.unet
