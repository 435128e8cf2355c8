"""Checks whether a run's model is finite, and the messages where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.optim import GuardedOptimizer
from mapo_fast.engine.step import PairInputs, predict, sample_errors
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorparts import all_finite


def made_finite(inputs: PairInputs) -> PairInputs:
    """A copy of a micro-batch in host memory, with zeros for values that are not finite.

    Otherwise bad data would look like a bad model.
    """
    return PairInputs(*(torch.nan_to_num(t.cpu(), nan=0.0, posinf=0.0, neginf=0.0) for t in inputs))


@torch.no_grad()
def is_healthy(trained: Iterable[Tensor], unet: Any, inputs: PairInputs | None) -> bool:
    """Whether all trained tensors of this process are finite, and so are the errors on finite input.

    Args:
        trained: the trained tensors.
        unet: predicts, in the caller's autocast.
        inputs: a micro-batch from `made_finite`; None checks the weights alone.
    """
    weights = all_finite(trained)
    if inputs is None:  # no early return for bad weights: a model that is split predicts in all processes
        return weights
    prediction = predict(unet, inputs)
    return all_finite([sample_errors(prediction, inputs.target)]) and weights


def check_start(healthy: bool, unet: Path, precision: str) -> None:
    """Raise for a start model that is not finite before the first step.

    Args:
        healthy: result of `is_healthy`.
        unet: the start model's folder, for the message.
        precision: `train.precision`.

    Raises:
        UserError: the start model is not healthy.
    """
    if not healthy:
        raise UserError(
            f"{unet} cannot be trained: the start model's weights or predictions are not finite with "
            f"train.precision = {precision!r}; copy the model's files again, or set another train.precision"
        )


def diverged(reason: str, first: int, store: CheckpointStore) -> str:
    """Drop the checkpoints that may hold the model as it is now and name the one before them.

    Args:
        reason: why the model was checked.
        first: the step of the model as it is now; no later one changed it.
        store: the run's checkpoints.

    Raises:
        UserError: a checkpoint cannot be removed.
    """
    kept = store.discard_from(first)
    if kept is None:
        return f"{reason}: the model has diverged before its first checkpoint; lower optim.lr"
    which = f"newest checkpoint from before that is step {kept} in {store.folder}"
    if kept >= first:
        which = (
            f"only checkpoint that is left, step {kept} in {store.folder}, may be of the diverged model "
            f"(train.keep_checkpoints = {store.keep})"
        )
    return f"{reason}: the model has diverged. The {which}; lower optim.lr in a new run"


def mostly_skipped(optimizer: GuardedOptimizer | FusedStep, steps: int, store: CheckpointStore) -> str | None:
    """The message for a run whose model is finite but most of whose steps changed nothing; else None.

    Where the step is fused into backward, a tensor that was skipped counts as its share of a step.
    """
    skipped = float(optimizer.skipped)
    if isinstance(optimizer, FusedStep):
        skipped += float(optimizer.skipped_tensors) / len(optimizer.parameters)
    if 2 * skipped <= steps:
        return None
    return (
        f"{skipped:.0f} of {steps} steps were not finite and were skipped: there is no result, the "
        f"checkpoint of step {steps} is in {store.folder}; look for damaged data (train.max_skipped_steps "
        "counts steps in a row only)"
    )
