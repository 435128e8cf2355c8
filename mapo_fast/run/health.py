"""Whether a run's model is of use, and what to say where it is not."""

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
    """The same micro-batch in host memory, with zeros for what is not finite.

    Bad data must not pass for a bad model.
    """
    return PairInputs(*(torch.nan_to_num(t.cpu(), nan=0.0, posinf=0.0, neginf=0.0) for t in inputs))


@torch.no_grad()
def is_healthy(trained: Iterable[Tensor], unet: Any, inputs: PairInputs | None) -> bool:
    """Whether all that is trained is finite in this process, and so are the errors on finite input.

    Args:
        trained: the trained tensors.
        unet: predicts, in the caller's autocast.
        inputs: of `made_finite`; None judges by the weights alone.
    """
    weights = all_finite(trained)
    if inputs is None:  # no early return for bad weights: a model that is split predicts in all processes
        return weights
    prediction = predict(unet, inputs)
    return all_finite([sample_errors(prediction, inputs.target)]) and weights


def check_start(healthy: bool, unet: Path, precision: str) -> None:
    """Refuse a start model that was of no use before the first step.

    Args:
        healthy: what `is_healthy` says of it.
        unet: its folder, for the message.
        precision: `train.precision`.

    Raises:
        UserError: it is not healthy.
    """
    if not healthy:
        raise UserError(
            f"{unet} cannot be trained: the start model's weights or predictions are not finite with "
            f"train.precision = {precision!r}; copy the model's files again, or set another train.precision"
        )


def diverged(reason: str, first: int, store: CheckpointStore) -> str:
    """Drop the checkpoints that may hold the model as it is now and name the one before them.

    Args:
        reason: why the model was looked at.
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
    """Why a run is no success although its model is healthy: most of its steps changed nothing.

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
