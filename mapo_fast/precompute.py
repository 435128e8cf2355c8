"""The pass before the first step: the start model's errors for every draw that the run will make."""

from __future__ import annotations

from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mapo_fast.engine.reference import PrecomputedErrors, StartModel
from mapo_fast.signals import StopRequest
from mapo_fast.trainer import Trainer


def precompute(
    trainer: Trainer, identity: dict[str, str], stop: StopRequest, console: Console | None
) -> bool:
    """Compute what is missing in the run's folder, and give the trainer all of it.

    Call it before `Trainer.restore`: it takes the start model that was built.

    Args:
        trainer: gets its `reference`.
        identity: fingerprints of the cache, the start model and its noise schedule.
        stop: ends it early; what is done is kept.
        console: where to show progress.

    Returns:
        Whether nothing is missing.
    """
    train, processes = trainer.config.train, trainer.processes
    settings = train.model_dump(include={"seed", "pairs_per_batch", "precision", "caption_dropout"})
    trainer.reference = reference = PrecomputedErrors(
        train.output / "reference",
        {**identity, **settings, "base": trainer.config.adapter.base},
        trainer.batches,
        train.steps * train.accumulation * processes.size,
        trainer.device,
        processes,
    )
    start = StartModel(trainer.unet)

    def errors(position: int) -> Tensor:
        return trainer.engine.errors_of(start, trainer.inputs(*trainer.batches.at(position)))

    if not (missing := reference.missing):
        return True
    columns = (TextColumn("reference"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console or Console(quiet=True)) as progress,
        closing(reference.compute(errors)) as positions,
    ):
        task = progress.add_task("", total=missing)
        for _ in positions:
            progress.advance(task)
            if processes.any(stop.requested):
                break
    return not reference.missing
