"""What a trainer's checkpoint and its best step hold, and how a trainer takes a checkpoint over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mapo_fast.engine.build import TrainingUnet
from mapo_fast.engine.processes import Processes
from mapo_fast.models.lora import lora_state_dict
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.best import Best
from mapo_fast.run.export import about_checkpoint, export, export_average
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.tensorparts import whole

if TYPE_CHECKING:
    from mapo_fast.run.trainer import Trainer

Files = dict[str, Mapping[str, Tensor]]


def trained_tensors(config: Config, unet: Any, parts: TrainingUnet) -> dict[str, Tensor]:
    """The trained tensors by name; parts of them where the model is split."""
    return lora_state_dict(unet) if config.adapter.kind == "lora" else parts.state_dict()


def saved_state(trainer: Trainer) -> tuple[Files, dict[str, Any]]:
    """Tensors by file, and the JSON state of a checkpoint; all processes call this together."""
    tensors, state = trainer.optimizer.state()
    state |= {
        "seed": trainer.config.train.seed,
        "metrics": trainer.metrics.state(),
        "best": trainer.looks.best.state(),
    }
    if trainer.engine.baseline is not None:
        state["baseline"] = trainer.engine.baseline.state()
    keep = trainer.processes.main
    files: Files = {
        "model": whole(trainer.model_tensors(), keep=keep),
        "optimizer": whole(tensors, keep=keep),
    }
    if trainer.ema is not None:
        files["average"] = trainer.ema.average
    return files, state


def restore_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Take over a checkpoint's weights, optimizer and figures.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    checkpoint.copy_into("model", trainer.model_tensors())
    if trainer.engine.parts.weights is not None:
        trainer.engine.parts.weights.reload()
    if trainer.ema is not None:
        trainer.ema.restore(checkpoint.views("average"))
    trainer.optimizer.restore(checkpoint.views("optimizer"), checkpoint.state)
    trainer.metrics.restore(checkpoint.state["metrics"])
    trainer.looks.best.restore(checkpoint.state.get("best", {}))
    if trainer.engine.baseline is not None:
        trainer.engine.baseline.restore(checkpoint.state["baseline"])


def export_results(trainer: Trainer, folder: Pipeline) -> list[str]:
    """Write the run's result, and its average where there is one; returns warnings."""
    config, unet, processes = trainer.config, trainer.unet, trainer.processes
    notes = export(config, unet, trainer.model_tensors(), folder, trainer.cache, processes)
    if trainer.ema is not None:
        with trainer.ema.in_place():
            average = trainer.ema.average
            processes.once(lambda: export_average(config, unet, average, folder))
    return notes


def keep_best(
    best: Best,
    checkpoints: CheckpointStore,
    tensors: Callable[[], Mapping[str, Tensor]],
    processes: Processes,
    step: int,
    about: dict[str, Any],
) -> None:
    """Write the model as it is to `best/`, instead of the earlier best one.

    Args:
        best: the rule that has chosen the step.
        checkpoints: the run's, of which `best/` has the id.
        tensors: gives the trained tensors.
        processes: of the run; all call this together.
        step: steps done.
        about: why it is the best one, for the record.
    """
    complete = whole(tensors(), keep=processes.main)
    best.store.run = checkpoints.run

    def write() -> None:
        text = f"{about_checkpoint(best.config, step)}\nWhy it is the best step: {about['reason']}.\n"
        best.store.save(step, {"model": complete}, about, text)
        best.store.discard_from(step + 1)  # of an earlier session, which had come further

    processes.once(write)
