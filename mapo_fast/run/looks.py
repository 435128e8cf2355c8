"""Held-out evaluations and previews of a run, made between steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mapo_fast.data.cache import PairCache
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.processes import Processes
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.run.best import Best
from mapo_fast.run.ema import Ema
from mapo_fast.run.evaluate import HeldOut, HeldOutErrors, compare, start_errors
from mapo_fast.run.log import RunLog
from mapo_fast.run.preview import Previews
from mapo_fast.settings.schema import Config
from mapo_fast.util.signals import StopNow


class Looks:
    """Evaluations and previews of one run; all processes take part in them.

    Args:
        config: the run's settings.
        unet: the trained UNet.
        cache: where the held-out pairs are.
        diffusion: noise schedule and target.
        precision: types of the forward passes.
        device: where the UNet is.
        previews: the previews of this process; None where it samples none.
        poll: called by all processes together, between held-out batches; raises `StopNow` at a signal.
        processes: the run's processes.
    """

    def __init__(
        self,
        config: Config,
        unet: Any,
        cache: PairCache,
        diffusion: Diffusion,
        precision: Precision,
        device: torch.device,
        previews: Previews | None,
        poll: Callable[[], None],
        processes: Processes,
    ) -> None:
        self.ema: Ema | None = None
        """The average of the weights, which is evaluated and previewed too."""
        self.config, self.unet, self.precision, self.device = config, unet, precision, device
        self.previews, self.poll, self.processes = previews, poll, processes
        self.held_out = HeldOut(
            cache,
            cache.held_out[: config.train.evaluate_pairs],
            diffusion,
            draws=config.train.evaluate_draws,
            draws_per_batch=config.train.pairs_per_batch,
            seed=config.train.seed,
            device=device,
            processes=processes,
        )
        self.best = Best(config, self.held_out)
        self.keep: Callable[[int, dict[str, Any]], None] = lambda step, about: None
        """Called by all processes together with a step that is the best so far, and what to keep of it."""
        self.start: HeldOutErrors | None = None
        """The start model's held-out errors; None where no pair is held out."""

    def measure_start(self, path: Path, run: str) -> list[str]:
        """Read the start model's held-out errors, or measure them, before the weights change.

        Args:
            path: the file that keeps them.
            run: the run's id.

        Returns:
            Lines to show.

        Raises:
            StopNow: a signal asks for the end.
        """
        context = self.precision.context(self.device)
        self.start, notes = start_errors(path, run, self.held_out, self.unet, context, self.poll)
        return notes

    def take(self, step: int, log: RunLog | None, *, always: bool, again: bool = False) -> None:
        """Evaluate and preview if `step` is due.

        Args:
            step: steps done.
            log: the log of process 0; None in the others.
            always: whether the step is due whatever the settings say.
            again: skip work that an earlier session has done at this step.

        Raises:
            StopNow: a signal asks for the end.
        """
        config, context = self.config, self.precision.context(self.device)
        evaluated, previewed = False, False
        if again and step:
            evaluated, previewed = self.processes.once(lambda: self._done(step, log))
        due = self.start is not None and (always or is_due(step, config.train.evaluate_every))
        if due and not evaluated:
            self._evaluate(step, log, context)
        if config.preview.prompts and (always or is_due(step, config.preview.every)) and not previewed:
            self._preview(step, log, context)

    def _done(self, step: int, log: RunLog | None) -> tuple[bool, bool]:
        """Whether an earlier session has evaluated this step, and written its previews."""
        evaluated = log is not None and log.evaluated == step
        return evaluated, self.previews is not None and self.previews.complete(step)

    def _evaluate(self, step: int, log: RunLog | None, context: AbstractContextManager[None]) -> None:
        start = self.start
        assert start is not None
        errors = start if step == 0 else self.held_out.errors(self.unet, context, self.poll)
        averaged = None
        if step and self.ema is not None:
            with self.ema.in_place():
                averaged = self.held_out.errors(self.unet, context, self.poll)

        def report() -> None:
            assert log is not None
            figures = compare(errors, start)
            if averaged is not None:
                figures["ema"] = compare(averaged, start)
            log.evaluation(step, figures)

        self.processes.once(report)
        if step and (about := self.best.take(step, errors, start)) is not None:
            self.keep(step, about)

    def _preview(self, step: int, log: RunLog | None, context: AbstractContextManager[None]) -> None:
        def write() -> bool:
            assert self.previews is not None
            main = self.processes.main
            try:
                written = self.previews.write(self.unet, step, context, main=main)
                if step and self.ema is not None:
                    with self.ema.in_place():
                        written += self.previews.write(self.unet, step, context, main=main, what="ema")
            except StopNow:
                return False
            if log is not None:
                log.images(step, written)
            return True

        if self.processes.shard(self.config) and not self.processes.main:
            write()
        if not self.processes.once(write):
            raise StopNow


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps (0: never) is due after `step`."""
    return every > 0 and step > 0 and step % every == 0
