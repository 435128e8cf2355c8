"""mapo_fast itself: the trainer's own `Engine` and data path, under a plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from bench.providers.base import Arithmetic, Provider
from bench.providers.task import LR, Task, fill_factors, load_unet
from mapo_fast.engine.build import prepare_unet, with_start_model
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import choose_precision
from mapo_fast.engine.prefetch import MicroBatch, Prefetch
from mapo_fast.engine.step import PairInputs
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import on_cpu


class MapoFast(Provider):
    """The engine under the settings of a plan."""

    name: ClassVar[str] = "mapo_fast"
    changes: ClassVar[Mapping[str, Any]] = {}
    """Settings that differ from the plan's, by `section.key`."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.config = plan(task, self.changes)
        precision = choose_precision(self.config, task.device)
        self.arithmetic = Arithmetic(
            precision.base,
            precision.autocast,
            precision.trainable,
            self.config.speed.fp8,
            self.config.adapter.base,
        )
        parts = prepare_unet(load_unet(task, precision.base), self.config, precision, task.device)
        parts = with_start_model(parts, self.config, lambda: load_unet(task, precision.base))
        self.unet = parts.unet
        fill_factors(self.unet)
        self._seen: dict[int, Tensor] = {}
        self._watching = False
        if self.config.train.fused_step or self.config.speed.cuda_graph:  # whose gradients are gone at once
            for p in self.unet.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._see)
        loss = build_loss(self.config.objective, self.pairs.diffusion.num_train_timesteps)
        self.engine = Engine(self.config, parts, loss, precision, task.device)
        self.micro_batches = self._micro_batches()
        if self.config.speed.prefetch:
            self.micro_batches = Prefetch(self.micro_batches, task.device)

    def watch(self, on: bool) -> None:
        """Keep copies of the gradients that a fused step frees, and let it change nothing.

        Afterwards the step is completed, at lr 0: a fused one takes no other backward pass before that.
        """
        self._watching = on
        if not on:
            self.engine.finish()

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for step in itertools.count():
            yield MicroBatch(self.pairs.batch(step), 1.0)

    def data(self, step: int) -> PairInputs:
        """The next micro-batch, read ahead as the trainer does; `step` counts them."""
        return next(self.micro_batches).inputs

    def accumulate(self, inputs: PairInputs) -> Tensor:
        """Forward and backward of the step's one micro-batch."""
        self.engine.start(0.0 if self._watching else LR)
        return self.engine.accumulate(inputs, 1.0).loss.detach()

    def update(self) -> None:
        """Take the guarded step, or the rest of a fused one."""
        self.engine.finish()

    def _see(self, parameter: Tensor) -> None:
        if self._watching and parameter.grad is not None:
            self._seen[id(parameter)] = parameter.grad.clone()

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """A parameter's gradient; for a fused step the copy made before the update."""
        found = self._seen.pop(id(parameter), None)
        return parameter.grad if found is None else found


def plan(task: Task, changes: Mapping[str, Any]) -> Config:
    """The settings for a task, with some changed."""
    gpu = task.device.type == "cuda"
    full = task.kind == "full"
    train: dict[str, Any] = {
        "layout": "split" if task.checkpointing else "joint",
        "gradient_checkpointing": task.checkpointing,
        "precision": ("pure_bf16" if full else "bf16") if gpu else "fp32",
        "fused_step": gpu and full,
    }
    config = task.config(train=train, optim={"name": "adamw8bit" if gpu else "adamw"})
    return with_settings(config, {**({} if gpu else on_cpu()), **changes})
