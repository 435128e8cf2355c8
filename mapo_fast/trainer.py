"""One run: its UNet, optimizer and position, and the loop over steps.

A step is `train.accumulation` micro-batches. Everything random is a function of (seed, epoch, pair id) and
the data order a function of (seed, position), so a checkpoint needs weights, optimizer and the step count
and nothing else to continue bit for bit. The host waits for the device once per logging interval; with
bitsandbytes' paged optimizer once per step.

Of W processes the r-th takes micro-batches r, r + W, r + 2W, … of the order of one: a step with
`train.accumulation` A is the step of one process with A · W. Process 0 writes everything; all take part in
evaluations, and in previews and checkpoints where the model is split.

A checkpoint is written before anything else that its step is due for. Whatever ends the run between two
checkpoints (a signal, a full disk, a shard that is gone, a mistake in this program) saves the last finished
step first; a second signal does not. A resumed run makes the evaluation and the previews that its step lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mapo_fast.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.config import Config
from mapo_fast.data.cache import CachedPair, PairCache
from mapo_fast.diffusion import Diffusion
from mapo_fast.distributed import ALONE, Processes, connection_lost
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.build import TrainingUnet, learning_rate
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.metrics import Metrics, peak_memory_mib
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.prefetch import MicroBatch, read_ahead
from mapo_fast.engine.reference import PrecomputedErrors
from mapo_fast.engine.step import PairInputs, training_inputs, upload
from mapo_fast.errors import UserError
from mapo_fast.evaluate import HeldOut, HeldOutErrors, compare, start_errors
from mapo_fast.export import about_checkpoint, export
from mapo_fast.health import diverged, finite_input, is_healthy, mostly_skipped
from mapo_fast.lora import lora_state_dict
from mapo_fast.model import SDXLFolder
from mapo_fast.objectives import build_loss
from mapo_fast.preview import Previews
from mapo_fast.runfolder import TrainResult
from mapo_fast.runlog import RunLog
from mapo_fast.signals import Interrupted, StopNow, StopRequest
from mapo_fast.tensorparts import whole


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
        self.config, self.unet, self.cache, self.diffusion = config, parts.unet, cache, diffusion
        self.precision, self.device, self.store, self.previews = precision, device, store, previews
        self.step = 0
        self.saved_step: int | None = None
        """Of the newest checkpoint that this run goes on from or has written."""
        self._tried: int | None = None
        """Step of the newest attempt to write one."""
        self._judged = False
        """Whether the run ends by its own judgement, which has saved what is worth it."""
        if previews is not None:
            # A model that is whole samples in one process, and the others cannot hear of its signals.
            previews.poll = self.poll if processes.shard(config) else self._poll_alone
            previews.poll_alone = self._poll_alone
        loss = build_loss(config.objective, diffusion.num_train_timesteps)
        self.engine = Engine(config, parts, loss, precision, device, processes)
        self.optimizer = self.engine.optimizer
        self.batches = MicroBatches(
            cache.train, config.train.pairs_per_batch, config.train.seed, paired=config.objective.paired
        )
        self.learning_rate = learning_rate(config.optim, config.train.steps)
        self.metrics = Metrics(device, processes, paired=config.objective.paired)
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
        self.start: HeldOutErrors | None = None
        self.reference: PrecomputedErrors | None = None

    def poll(self) -> None:
        """Where to leave what can be left; all processes call it together.

        Raises:
            StopNow: any of them got a signal.
        """
        if self.processes.any(self.stop.requested):
            raise StopNow

    def _poll_alone(self) -> None:
        if self.stop.requested:
            raise StopNow

    def measure_start(self, path: Path, run: str) -> list[str]:
        """Read the start model's held-out errors, or measure them, before `restore`; returns what to say.

        Raises:
            StopNow: a signal asks for the end.
        """
        context = self.precision.context(self.device)
        self.start, notes = start_errors(path, run, self.held_out, self.unet, context, self.poll)
        return notes

    def run(self, log: RunLog | None, folder: SDXLFolder) -> TrainResult:
        """Train to the last step or the first signal to any process, then save.

        Args:
            log: of process 0; None in the others.

        Raises:
            Interrupted: a second signal; it says what is saved.
            Exception: whatever else ended the run. The last finished step is saved then, if it can be.
        """
        try:
            finished = self._to_the_end(log)
            if finished:
                if problem := mostly_skipped(self.optimizer, self.step, self.store):
                    self._judged = True
                    raise self.processes.failed(problem)
                export(self.config, self.unet, self._model_tensors(), folder, self.processes)
        except KeyboardInterrupt:
            text = f"interrupted after step {self.step}; {self._what_is_saved()}"
            raise Interrupted(self.stop.number, text) from None
        except Exception as error:
            self._rescue(error, log)
            raise
        if log is not None:
            log.end(self.step, finished=finished)
        return self.result(self.step, finished=finished)

    def result(self, step: int, *, finished: bool) -> TrainResult:
        """What the run has come to; all processes call it together."""
        number = int(self.processes.largest(self.stop.number))
        skipped = int(self.optimizer.skipped)
        return TrainResult(self.config.train.output, step, finished, skipped, self.saved_step, number)

    def _to_the_end(self, log: RunLog | None) -> bool:
        """Take the steps that are left; returns whether that is all of them, or a signal came before."""
        source, prefetch = self._micro_batches(self.step), self.config.speed.prefetch
        try:
            self.poll()
            self._look(log, always=self.step in (0, self.config.train.steps), again=True)
            with read_ahead(source, self.device, prefetch=prefetch) as micro_batches:
                self._loop(micro_batches, log)
        except StopNow:
            if self.step and self.saved_step != self.step:
                if not self._healthy():
                    raise self.processes.failed(self._diverged(f"stopped at step {self.step}")) from None
                self.save()
            return False
        return True

    def _loop(self, micro_batches: Iterator[MicroBatch], log: RunLog | None) -> None:
        config = self.config.train
        while self.step < config.steps:
            self.metrics.add_step(self._step(micro_batches))
            stopping = self.processes.any(self.stop.requested)
            if log is not None:
                log.advance(self.step)
            finished = self.step == config.steps
            if finished or stopping or self.step % config.log_every == 0:
                self._log(log)
            if finished and not self._healthy():
                raise self.processes.failed(self._diverged("the run's last step"))
            if finished or (_due(self.step, config.checkpoint_every) and self._healthy()):
                self.save()
            if stopping:
                raise StopNow
            self._look(log, always=finished)

    def _step(self, micro_batches: Iterator[MicroBatch]) -> Tensor:
        """One optimizer step; returns its 0-d gradient norm on the device."""
        self.engine.start(self.learning_rate(self.step), self.step)
        self.metrics.begin()
        # What fails in one process ends all of them at this point, unless they wait for one another within.
        together = self.processes.shard(self.config) or self.engine.baseline is not None
        for _ in range(self.config.train.accumulation):
            if together:
                self._accumulate(self.processes.each(lambda: next(micro_batches)))
            else:
                self.processes.each(lambda: self._accumulate(next(micro_batches)))
        norm = self.engine.finish()
        self.step += 1
        return norm

    def _accumulate(self, batch: MicroBatch) -> None:
        out = self.engine.accumulate(
            batch.inputs, batch.share, reference_errors=batch.reference_errors, labels=batch.labels
        )
        self.metrics.add(out)

    def _rescue(self, error: Exception, log: RunLog | None) -> None:
        """Save what an error would lose, and add to its message what is saved."""
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
            # The others may know nothing of such an error: only a model that is whole here can be saved.
            if self.processes.shard(self.config) or not self.processes.main or connection_lost(error):
                return self._what_is_saved()
            self.processes = self.metrics.processes = ALONE
        self.engine.drop()
        self.metrics.drop()
        try:
            if not self._healthy():
                return f"step {self.step} is not saved, the model has diverged; {self._what_is_saved()}"
            self.save()
        except Exception as second:
            return f"step {self.step} could not be saved ({second}); {self._what_is_saved()}"
        return self._what_is_saved()

    def _what_is_saved(self) -> str:
        if self.saved_step is None:
            return "no step was saved"
        return f"step {self.saved_step} is saved, and --resume continues from it"

    def _micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's ones of all steps from `step` on."""
        count = self.config.train.accumulation * self.processes.size
        for first in range(step * count, self.config.train.steps * count, count):
            found = [self.batches.at(first + i) for i in range(count)]
            total = sum(len(pairs) for _, pairs in found)
            for i in range(self.processes.rank, count, self.processes.size):
                position, (epoch, pairs) = first + i, found[i]
                inputs, known = self.inputs(epoch, pairs), None
                if self.reference is not None:
                    known = self.reference.at(position, len(inputs.noisy) // 2)
                yield MicroBatch(inputs, len(pairs) / total, known, self._labels(pairs))

    def inputs(self, epoch: int, pairs: list[CachedPair]) -> PairInputs:
        """What the UNet is given for these pairs in this epoch."""
        return training_inputs(
            self.cache,
            pairs,
            self.diffusion,
            seed=self.config.train.seed,
            epoch=epoch,
            caption_dropout=self.config.train.caption_dropout,
            device=self.device,
        )

    def _labels(self, pairs: list[CachedPair]) -> Tensor | None:
        """(B,) soft labels on the device, for an objective that needs them; (2B,) of single images."""
        if not self.config.objective.paired:
            return upload(self.cache.wanted(pairs), self.device)
        if self.config.objective.known.labels != "required":
            return None
        return upload(self.cache.labels(pairs), self.device)

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
        if self._healthy():
            self.save()
            return f"{reason}; the weights are, and are saved at step {self.step}: look for damaged data"
        return self._diverged(reason)

    def _diverged(self, reason: str) -> str:
        self._judged = True
        first = self.step - int(self.optimizer.skipped_in_a_row)
        return self.processes.once(lambda: diverged(reason, first, self.store))

    def _healthy(self) -> bool:
        known = self._finite_input
        inputs = None if known is None else PairInputs(*(t.to(self.device) for t in known))
        with self.precision.context(self.device):
            healthy = is_healthy(self._model_tensors().values(), self.unet, inputs)
        return not self.processes.any(not healthy)

    @cached_property
    def _finite_input(self) -> PairInputs | None:
        try:
            return finite_input(self.inputs(*self.batches.at(0)))
        except (UserError, OSError):  # it cannot be read, and what is trained must not be lost for that
            return None

    def _look(self, log: RunLog | None, *, always: bool, again: bool = False) -> None:
        """Evaluate and preview where this step is due for it; `again`: where that was not done before."""
        config = self.config
        context = self.precision.context(self.device)
        done = (False, False)
        if again and self.step:
            done = self.processes.once(lambda: self._looked(log))
        if (
            self.start is not None
            and (always or _due(self.step, config.train.evaluate_every))
            and not done[0]
        ):
            errors = self.start if self.step == 0 else self.held_out.errors(self.unet, context, self.poll)
            start = self.start

            def report() -> None:
                assert log is not None
                log.evaluation(self.step, compare(errors, start))

            self.processes.once(report)
        if config.preview.prompts and (always or _due(self.step, config.preview.every)) and not done[1]:
            self._preview(context)
        self.metrics.restart_clock()

    def _looked(self, log: RunLog | None) -> tuple[bool, bool]:
        """Whether this step has been evaluated and has its previews, by an earlier session."""
        evaluated = log is not None and log.evaluated
        return evaluated, self.previews is not None and self.previews.complete(self.step)

    def _preview(self, context: AbstractContextManager[None]) -> None:
        def write() -> bool:
            assert self.previews is not None
            try:
                self.previews.write(self.unet, self.step, context, main=self.processes.main)
            except StopNow:
                return False
            return True

        if self.processes.shard(self.config) and not self.processes.main:
            write()
        if not self.processes.once(write):
            raise StopNow

    def _model_tensors(self) -> dict[str, Tensor]:
        if self.config.adapter.kind == "lora":
            return lora_state_dict(self.unet)
        return self.engine.parts.state_dict()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        tensors, state = self.optimizer.state()
        state |= {"seed": self.config.train.seed, "metrics": self.metrics.state()}
        if self.engine.baseline is not None:
            state["baseline"] = self.engine.baseline.state()
        keep = self.processes.main
        files = {"model": whole(self._model_tensors(), keep=keep), "optimizer": whole(tensors, keep=keep)}
        about = about_checkpoint(self.config, self.step)
        self._tried = self.step
        self.processes.once(lambda: self.store.save(self.step, files, state, about))
        self.saved_step = self.step
        self.metrics.restart_clock()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's weights, optimizer and position.

        Raises:
            UserError: the checkpoint is of another model or optimizer, or beyond the last step.
        """
        if checkpoint.step > self.config.train.steps:
            raise UserError(
                f"train.steps = {self.config.train.steps}, but {checkpoint.path} is already at step "
                f"{checkpoint.step}"
            )
        checkpoint.copy_into("model", self._model_tensors())
        if self.engine.parts.weights is not None:
            self.engine.parts.weights.reload()
        self.optimizer.restore(checkpoint.views("optimizer"), checkpoint.state)
        self.metrics.restore(checkpoint.state["metrics"])
        if self.engine.baseline is not None:
            self.engine.baseline.restore(checkpoint.state["baseline"])
        self.step = self.saved_step = checkpoint.step


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
