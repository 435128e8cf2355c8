"""Base classes of providers: data, forward and backward, update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bench.providers.task import Pairs, Task
from mapo_fast.engine.step import PairInputs

Objective = Literal["mapo", "dpo"]
BOTH = ("full", "lora")
"""Kinds of training."""


@dataclass(frozen=True)
class Arithmetic:
    """Types in which a provider stores weights and computes."""

    weights: torch.dtype
    autocast: torch.dtype | None = None
    factors: torch.dtype | None = None
    """Type of LoRA factors; None stores them like the weights."""
    fp8: bool = False
    """`speed.fp8`: some products are of operands rounded to fp8."""
    base: Literal["dense", "fp8"] = "dense"
    """`adapter.base`: how a LoRA's frozen weights are stored, and multiplied."""

    @property
    def computes_in(self) -> torch.dtype:
        """The type whose rounding decides how exact results can be."""
        return self.autocast or self.weights

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """The autocast context of the types, empty without autocast."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


class Provider(ABC):
    """One way to train; made with the model loaded and ready."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = BOTH
    objective: ClassVar[Objective] = "mapo"
    arithmetic: Arithmetic
    unet: Any
    """What is trained."""
    differences: Sequence[str] = ()
    """Intended differences from mapo_fast."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pairs = Pairs(task)

    @property
    def forwards(self) -> Sequence[torch.nn.Module]:
        """Modules whose calls are the forward pass."""
        return (self.unet,)

    def data(self, step: int) -> PairInputs:
        """The step's batch on the device, made from the data on disk."""
        return self.pairs.batch(step)

    @abstractmethod
    def accumulate(self, inputs: PairInputs) -> Tensor:
        """Forward and backward; returns the 0-d loss on the device."""

    @abstractmethod
    def update(self) -> None:
        """Change the weights and drop the gradients."""

    def watch(self, on: bool) -> None:  # noqa: B027 - most need not know
        """Announce that `gradient` will be called after the next `accumulate`, or that the calls are done."""

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The true gradient of a parameter after `accumulate`."""
        return parameter.grad
