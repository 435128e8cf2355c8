"""What a run's checkpoint, its best step and its results hold, and how a checkpoint is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mapo_fast.data.cache import PairCache
from mapo_fast.engine.build import TrainingUnet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.processes import Processes
from mapo_fast.models.lora import lora_state_dict
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.best import Best
from mapo_fast.run.ema import Ema
from mapo_fast.run.export import about_checkpoint, export, export_average
from mapo_fast.run.metrics import Metrics
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.tensorparts import whole

Files = dict[str, Mapping[str, Tensor]]


class RunState:
    """The state of one run between two steps; all processes call its methods together.

    Args:
        config: the run's settings.
        engine: UNet and optimizer.
        metrics: sums of the logging interval.
        processes: the run's processes.
    """

    def __init__(self, config: Config, engine: Engine, metrics: Metrics, processes: Processes) -> None:
        self.config, self.engine, self.metrics, self.processes = config, engine, metrics, processes
        self.tensors = partial(_trained, config.adapter.kind, engine.parts)
        """Gives the trained tensors by name; parts of them where the model is split."""
        self.ema = None if config.ema.half_life is None else Ema(config.ema, self.tensors, engine.parts)
        """The average of the weights, where one is asked for."""

    def saved(self, best: Best) -> tuple[Files, dict[str, Any]]:
        """Tensors by file, and the JSON state, of a checkpoint."""
        tensors, state = self.engine.optimizer.state()
        state |= {"seed": self.config.train.seed, "metrics": self.metrics.state(), "best": best.state()}
        if self.engine.baseline is not None:
            state["baseline"] = self.engine.baseline.state()
        keep = self.processes.main
        files: Files = {"model": whole(self.tensors(), keep=keep), "optimizer": whole(tensors, keep=keep)}
        if self.ema is not None:
            files["average"] = self.ema.average
        return files, state

    def restore(self, checkpoint: Checkpoint, best: Best) -> None:
        """Take over a checkpoint's weights, optimizer and figures.

        Raises:
            UserError: the checkpoint is of another model or optimizer.
        """
        checkpoint.copy_into("model", self.tensors())
        if self.engine.parts.weights is not None:
            self.engine.parts.weights.reload()
        if self.ema is not None:
            self.ema.restore(checkpoint.views("average"))
        self.engine.optimizer.restore(checkpoint.views("optimizer"), checkpoint.state)
        self.metrics.restore(checkpoint.state["metrics"])
        best.restore(checkpoint.state.get("best", {}))
        if self.engine.baseline is not None:
            self.engine.baseline.restore(checkpoint.state["baseline"])

    def keep_best(self, store: CheckpointStore, step: int, about: dict[str, Any]) -> None:
        """Write the model as it is to `best/`, instead of the earlier best one.

        Args:
            store: of `best/`.
            step: steps done.
            about: why it is the best one, for the record.
        """
        complete = whole(self.tensors(), keep=self.processes.main)

        def write() -> None:
            text = f"{about_checkpoint(self.config, step)}\nWhy it is the best step: {about['reason']}.\n"
            store.save(step, {"model": complete}, about, text)
            store.discard_from(step + 1)  # of an earlier session, which had come further

        self.processes.once(write)

    def export(self, folder: Pipeline, cache: PairCache) -> list[str]:
        """Write the run's result, and its average where there is one; returns warnings."""
        unet, processes = self.engine.unet, self.processes
        notes = export(self.config, unet, self.tensors(), folder, cache, processes)
        if (ema := self.ema) is not None:
            with ema.in_place():
                processes.once(lambda: export_average(self.config, unet, ema.average, folder))
        return notes


def _trained(kind: str, parts: TrainingUnet) -> dict[str, Tensor]:
    return lora_state_dict(parts.unet) if kind == "lora" else parts.state_dict()
