"""What a trainer's checkpoint and its best step hold, and how a trainer takes a checkpoint over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mapo_fast.run.export import about_checkpoint
from mapo_fast.util.checkpoint import Checkpoint
from mapo_fast.util.tensorparts import whole

if TYPE_CHECKING:
    from mapo_fast.run.trainer import Trainer

Files = dict[str, Mapping[str, Tensor]]


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
    return {
        "model": whole(trainer.model_tensors(), keep=keep),
        "optimizer": whole(tensors, keep=keep),
    }, state


def restore_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Take over a checkpoint's weights, optimizer and figures.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    checkpoint.copy_into("model", trainer.model_tensors())
    if trainer.engine.parts.weights is not None:
        trainer.engine.parts.weights.reload()
    trainer.optimizer.restore(checkpoint.views("optimizer"), checkpoint.state)
    trainer.metrics.restore(checkpoint.state["metrics"])
    trainer.looks.best.restore(checkpoint.state.get("best", {}))
    if trainer.engine.baseline is not None:
        trainer.engine.baseline.restore(checkpoint.state["baseline"])


def keep_best(trainer: Trainer, step: int, about: dict[str, Any]) -> None:
    """Write the model as it is to `best/`, instead of the earlier best one."""
    store, tensors = trainer.looks.best.store, whole(trainer.model_tensors(), keep=trainer.processes.main)
    store.run = trainer.store.run

    def write() -> None:
        text = f"{about_checkpoint(trainer.config, step)}\nWhy it is the best step: {about['reason']}.\n"
        store.save(step, {"model": tensors}, about, text)
        store.discard_from(step + 1)  # of an earlier session, which had come further

    trainer.processes.once(write)
    trainer.metrics.restart_clock()
