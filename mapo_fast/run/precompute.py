"""The pass before the first step: the start model's errors for every draw that the run will make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch import Tensor

from mapo_fast.engine.build import start_of
from mapo_fast.engine.prefetch import MicroBatch, read_ahead
from mapo_fast.engine.reference import PrecomputedErrors
from mapo_fast.run.trainer import Trainer
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import affecting, value_of
from mapo_fast.util.progress import Callbacks, stage


def depends_on(config: Config, identity: dict[str, str]) -> dict[str, Any]:
    """Everything that the errors depend on: fingerprints of the run's inputs, and its settings."""
    return {**identity, **{row.key: value_of(config, row.name) for row in affecting("reference")}}


def precompute(trainer: Trainer, run: str, identity: dict[str, str], callbacks: Callbacks) -> None:
    """Compute errors that are missing in the run's folder, and give all errors to the trainer.

    Call it before `Trainer.restore`: the UNet must still be the start model.

    Args:
        trainer: the trainer whose feed gets the `reference`.
        run: the run's id.
        identity: fingerprints of the cache, the start model and its noise schedule.
        callbacks: called with the stage "reference".

    Raises:
        StopNow: a signal asks for the end; the errors computed so far are kept.
    """
    train, processes = trainer.config.train, trainer.processes
    trainer.feed.reference = reference = PrecomputedErrors(
        train.output / "reference",
        {"run": run, **depends_on(trainer.config, identity)},
        trainer.feed.batches,
        train.steps * train.accumulation * processes.size,
        trainer.device,
        processes,
    )
    if not (missing := reference.missing):
        return
    start, mine = start_of(trainer.unet, trainer.config), reference.positions()
    source = (
        MicroBatch(trainer.feed.inputs(*trainer.feed.batches.at(position)), share=1.0) for position in mine
    )
    prefetch = trainer.config.speed.prefetch

    def errors(batches: Iterator[MicroBatch]) -> Iterator[Tensor]:
        for _ in mine:
            batch = processes.each(lambda: next(batches))
            yield trainer.engine.errors_of(start, batch.inputs)

    with (
        stage(callbacks, "reference", missing) as advance,
        read_ahead(source, trainer.device, prefetch=prefetch) as batches,
        closing(reference.compute(errors(batches))) as positions,
    ):
        for _ in positions:
            advance(1)
            trainer.poll()
