"""One run: its UNet, optimizer and position, and the loop over steps.

A step is `train.accumulation` micro-batches. Everything random is a function of (seed, epoch, pair id) and
the data order a function of (seed, position), so a checkpoint needs weights, optimizer and the step count
and nothing else to continue bit for bit. The host waits for the device once per logging interval.

W processes with `train.accumulation` A take exactly the step that one process takes with A · W: the r-th
takes micro-batches r, r + W, r + 2W, … of the one order. Process 0 writes everything; all take part in
evaluations, and in previews and checkpoints where the model is split.

A checkpoint is written before anything else that its step is due for. Whatever ends the run between two
checkpoints (a signal, a full disk, a shard that is gone, a mistake in this program) saves the last finished
step first; a second signal does not. A resumed run makes the evaluation and the previews that its step lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from mapo_fast.data.cache import PairCache
from mapo_fast.engine.build import TrainingUnet, learning_rate
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.prefetch import MicroBatch, read_ahead
from mapo_fast.engine.processes import ALONE, Processes, connection_lost
from mapo_fast.engine.step import PairInputs
from mapo_fast.engine.timestep_weights import timestep_weights
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.export import about_checkpoint, export_step
from mapo_fast.run.feed import Feed
from mapo_fast.run.folder import FitResult
from mapo_fast.run.health import diverged, is_healthy, mostly_skipped
from mapo_fast.run.log import RunLog
from mapo_fast.run.looks import Looks, is_due
from mapo_fast.run.metrics import Metrics, peak_memory_mib
from mapo_fast.run.preview import Previews
from mapo_fast.run.state import RunState
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.signals import Interrupted, StopNow, StopRequest


class Trainer:
    """One run: its UNet, optimizer and position."""

    def __init__(
        self,
        config: Config,
        parts: TrainingUnet,
        cache: PairCache,
        diffusion: Diffusion,
        precision: Precision,
        device: torch.device,
        store: CheckpointStore,
        previews: Previews | None,
        stop: StopRequest,
        processes: Processes = ALONE,
    ) -> None:
        self.stop, self.processes = stop, processes
        self.poll = partial(processes.poll, stop)  # not a method, which would keep the trainer alive
        self.config, self.unet, self.cache = config, parts.unet, cache
        self.precision, self.device, self.store = precision, device, store
        self.step = 0
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this run has continued from or written."""
        self._tried: int | None = None
        """Step of the newest attempt to write a checkpoint."""
        self._judged = False
        """Whether the run ends itself (divergence, skipped steps) and has saved what can be used."""
        if previews is not None:
            # A model that is not split samples in one process, and the others do not get its signals.
            previews.poll = self.poll if processes.shard(config) else stop.poll
            previews.poll_alone = stop.poll
        loss = build_loss(config.objective, diffusion.num_train_timesteps)
        weights = timestep_weights(config.train, diffusion, device)
        self.engine = Engine(config, parts, loss, precision, device, processes, weights=weights)
        self.optimizer = self.engine.optimizer
        self.learning_rate = learning_rate(config.optim, config.train.steps)
        self.metrics = Metrics(device, processes, paired=cache.paired)
        self.feed = Feed(config, cache, diffusion, device, processes)
        self.state = RunState(config, self.engine, self.metrics, processes)
        self.looks = Looks(
            config, self.unet, cache, diffusion, precision, device, previews, self.poll, processes
        )
        self.looks.ema = self.state.ema

    def run(self, log: RunLog | None, folder: Pipeline) -> FitResult:
        """Train to the last step or the first signal to any process, then save.

        Args:
            log: the log of process 0; None in the others.

        Raises:
            Interrupted: a second signal; the text says what is saved.
            Exception: any other error. The last finished step is saved first, if possible.
        """
        self.looks.best.store.run = self.store.run
        self.looks.keep = partial(self.state.keep_best, self.looks.best.store)
        try:
            finished = self._to_the_end(log, folder)
            if finished:
                if problem := mostly_skipped(self.optimizer, self.step, self.store):
                    self._judged = True
                    raise self.processes.failed(problem)
                for note in self.state.export(folder, self.cache):
                    if log is not None:
                        log.warning(self.step, note)
        except KeyboardInterrupt:
            said = f"interrupted after step {self.step}; {self._what_is_saved()}"
            raise Interrupted(self.stop.number, said) from None
        except Exception as error:
            self._rescue(error, log)
            raise
        if log is not None:
            log.end(self.step, finished=finished)
        return self.result(self.step, finished=finished)

    def result(self, step: int, *, finished: bool) -> FitResult:
        """The result of the run; all processes call this together."""
        number, skipped = int(self.processes.largest(self.stop.number)), int(self.optimizer.skipped)
        output, kind = self.config.train.output, "lora" if self.config.adapter.kind == "lora" else "unet"
        made = output / kind if finished else None
        best = self.looks.best.step or None
        return FitResult(output, step, finished, skipped, self.saved_step, number, best, made)

    def _to_the_end(self, log: RunLog | None, folder: Pipeline) -> bool:
        """Take the remaining steps; returns False if a signal stopped the run before the last one."""
        source, prefetch = self.feed.micro_batches(self.step), self.config.speed.prefetch
        try:
            self.poll()
            self.looks.take(self.step, log, always=self.step in (0, self.config.train.steps), again=True)
            self.metrics.restart_clock()
            with read_ahead(source, self.device, prefetch=prefetch) as micro_batches:
                self._loop(micro_batches, log, folder)
            if self.looks.best.exhausted:
                self._save_stopped()
                self.looks.take(self.step, log, always=True, again=True)
                if log is not None:
                    log.warning(self.step, self.looks.best.ending)
        except StopNow:
            self._save_stopped()
            return False
        return True

    def _save_stopped(self) -> None:
        """Save the last step of a run that ends before its end."""
        if self.step and self.saved_step != self.step:
            if not self.healthy():
                raise self.processes.failed(self._diverged(f"stopped at step {self.step}")) from None
            self.save()

    def _loop(self, micro_batches: Iterator[MicroBatch], log: RunLog | None, folder: Pipeline) -> None:
        config = self.config.train
        while self.step < config.steps and not self.looks.best.exhausted:
            self.metrics.add_step(self._step(micro_batches))
            stopping = self.processes.any(self.stop.requested)
            if log is not None:
                log.advance(self.step)
            finished = self.step == config.steps
            if finished or stopping or self.step % config.log_every == 0:
                self._log(log)
            if finished and not self.healthy():
                raise self.processes.failed(self._diverged("the run's last step"))
            if finished or (is_due(self.step, config.checkpoint_every) and self.healthy()):
                self.save()
            if is_due(self.step, config.export_every):
                self.processes.once(lambda: export_step(self.config, self.unet, folder, self.step))
            if stopping:
                raise StopNow
            self.looks.take(self.step, log, always=finished)
            self.metrics.restart_clock()

    def _step(self, micro_batches: Iterator[MicroBatch]) -> Tensor:
        """One optimizer step; returns its 0-d gradient norm on the device."""
        self.engine.start(self.learning_rate(self.step), self.step)
        self.metrics.begin()
        # An error in one process ends all of them here, unless they wait for one another inside the step.
        together = self.processes.shard(self.config) or self.engine.baseline is not None
        for _ in range(self.config.train.accumulation):
            if together:
                self._accumulate(self.processes.each(lambda: next(micro_batches)))
            else:
                self.processes.each(lambda: self._accumulate(next(micro_batches)))
        norm = self.engine.finish()
        self.step += 1
        if self.state.ema is not None:
            self.state.ema.after(self.step)
        return norm

    def _accumulate(self, batch: MicroBatch) -> None:
        out = self.engine.accumulate(
            batch.inputs, batch.share, reference_errors=batch.reference_errors, labels=batch.labels
        )
        self.metrics.add(out)

    def _rescue(self, error: Exception, log: RunLog | None) -> None:
        """Save the last finished step after an error, and add to its message what is saved."""
        if self._judged:
            return
        said = self._save_before(error)
        if isinstance(error, UserError):
            error.args = (f"{error}; {said}",)
        elif log is not None:
            with suppress(UserError):
                log.warning(self.step, f"the run ends with an error; {said}")

    def _save_before(self, error: Exception) -> str:
        """Save the last finished step, where there is one and its state is whole; returns what is saved."""
        if self.step in (0, self.saved_step, self._tried) or self.engine.changing:
            return self._what_is_saved()
        if self.processes.size > 1 and not isinstance(error, UserError):
            # The other processes may not have this error, so only a model that is not split can be saved.
            if self.processes.shard(self.config) or not self.processes.main or connection_lost(error):
                return self._what_is_saved()
            self.processes = self.metrics.processes = self.state.processes = ALONE
        self.engine.drop()
        self.metrics.drop()
        try:
            if not self.healthy():
                return f"step {self.step} is not saved, the model has diverged; {self._what_is_saved()}"
            self.save()
        except Exception as second:
            return f"step {self.step} could not be saved ({second}); {self._what_is_saved()}"
        return self._what_is_saved()

    def _what_is_saved(self) -> str:
        if self.saved_step is None:
            return "no step was saved"
        return f"step {self.saved_step} is saved, and --resume continues from it"

    def _log(self, log: RunLog | None) -> None:
        """Fetch the interval's metrics (the one wait for the device) and write them."""
        figures, in_a_row = self.metrics.fetch(self.optimizer)
        figures["lr"] = self.learning_rate(self.step - 1)
        figures["peak_memory_mib"] = self.processes.largest(peak_memory_mib(self.device))
        if self.engine.parts.compiled is not None:
            figures["compile_s"] = self.engine.parts.compiled.seconds

        def write() -> None:
            assert log is not None
            log.step(self.step, figures)

        self.processes.once(write)
        self.metrics.reset()
        if in_a_row > self.config.train.max_skipped_steps:
            raise self.processes.failed(self._stopped(in_a_row))

    def _stopped(self, in_a_row: int) -> str:
        """Keep the last good state and say where it is."""
        self._judged = True
        limit = self.config.train.max_skipped_steps
        reason = f"{in_a_row} steps in a row were not finite (train.max_skipped_steps = {limit})"
        if self.healthy():
            self.save()
            return f"{reason}; the weights are, and are saved at step {self.step}: look for damaged data"
        return self._diverged(reason)

    def _diverged(self, reason: str) -> str:
        self._judged = True
        first = self.step - int(self.optimizer.skipped_in_a_row)
        return self.processes.once(lambda: diverged(reason, first, self.store))

    def healthy(self) -> bool:
        """Whether the model and its predictions are finite; all processes call this together."""
        known = self.feed.finite_input
        inputs = None if known is None else PairInputs(*(t.to(self.device) for t in known))
        with self.precision.context(self.device):
            healthy = is_healthy(self.state.tensors().values(), self.unet, inputs)
        return not self.processes.any(not healthy)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        files, state = self.state.saved(self.looks.best)
        about = about_checkpoint(self.config, self.step)
        self._tried = self.step
        self.processes.once(lambda: self.store.save(self.step, files, state, about))
        self.saved_step = self.step
        self.metrics.restart_clock()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's weights, optimizer and position.

        Raises:
            UserError: the checkpoint is of another model or optimizer, or after the last step.
        """
        if checkpoint.step > (steps := self.config.train.steps):
            raise UserError(
                f"train.steps = {steps}, but {checkpoint.path} is already at step {checkpoint.step}"
            )
        self.state.restore(checkpoint, self.looks.best)
        self.step = self.saved_step = checkpoint.step
