"""Callbacks by which `prepare` and `fit` report progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

TRAINING = "training"
"""Name of the stage that also reports figures."""


class Callbacks:
    """Progress callbacks; every method does nothing, so override those you need.

    They are called one at a time, in the thread that called `prepare` or `fit`; of several processes only
    process 0 calls them. An exception in a callback ends the work as any other error does: `prepare` keeps
    the encoded pairs, `fit` saves the last finished step.
    """

    def message(self, text: str) -> None:
        """Say one line about what is being done."""

    def warning(self, text: str, step: int | None = None) -> None:
        """Say what the user should know; `step` is the optimizer step of a run, where there is one."""

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` items, `done` of which are there already.

        `prepare` has "scan" (rows), "prompts, encoder 1", "prompts, encoder 2" and "images"; `fit` has
        "reference" (micro-batches, where objective.reference is precomputed) and "training" (steps).
        """

    def advance(self, stage: str, done: int) -> None:
        """Say that `done` items of the stage are there, those of `begin` included."""

    def end(self, stage: str) -> None:
        """End a stage, also where it was cut short."""

    def step(self, step: int, total: int, figures: Mapping[str, float]) -> None:
        """Give the figures of the last `train.log_every` steps, under their names in `log.jsonl`."""

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Give the figures of a held-out evaluation, as in `log.jsonl`."""


@contextmanager
def stage(callbacks: Callbacks, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Report a stage of `total` items; yields a function to call with the number of newly finished items."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        callbacks.advance(name, done)

    callbacks.begin(name, total)
    try:
        yield advance
    finally:
        callbacks.end(name)
