"""The training loop: one UNet in memory, cached latents and embeddings, MaPO on pairs.

A step is `train.accumulation` micro-batches. Everything random is a function of (seed, epoch, pair id) and
the data order a function of (seed, position), so a checkpoint needs weights, optimizer and the step count
and nothing else to continue bit for bit. The host waits for the device once per logging interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mapo_fast.checkpoint import Checkpoint, CheckpointStore, save_unet
from mapo_fast.config import Config
from mapo_fast.data.cache import PairCache
from mapo_fast.diffusion import Diffusion
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.build import build_unet, learning_rate, scheduler_overrides
from mapo_fast.engine.metrics import Metrics, memory_mib
from mapo_fast.engine.optim import GuardedOptimizer, build_optimizer
from mapo_fast.engine.optim_state import flatten_optimizer_state, restore_optimizer_state
from mapo_fast.engine.precision import Precision, choose_device, choose_precision
from mapo_fast.engine.step import predict, training_inputs
from mapo_fast.errors import UserError
from mapo_fast.evaluate import HeldOut, compare, load_errors, save_errors
from mapo_fast.files import write_json
from mapo_fast.lora import lora_state_dict, save_lora
from mapo_fast.model import SDXLFolder, open_sdxl
from mapo_fast.objectives import build_loss
from mapo_fast.preview import Previews
from mapo_fast.runfolder import check_output, claim_output
from mapo_fast.runlog import RunLog, find_wandb
from mapo_fast.signals import StopRequest

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    output: Path
    step: int
    finished: bool
    """False when a signal stopped it early; the checkpoint to resume from is written."""
    skipped_steps: int
    """Steps that were not finite and changed nothing."""


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Fine-tune as `config` says.

    The result stands at `<train.output>/unet` (full) or `<train.output>/lora`.

    Raises:
        UserError: anything wrong with the config, the model folder, the cache or the output folder.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.train.wandb is not None:
        find_wandb()
    device = choose_device(config.train)
    precision = choose_precision(config, device)
    folder = open_sdxl(config.model.path, config.model.vae, scheduler_overrides(config.train))
    diffusion = Diffusion(folder.scheduler_config)
    cache = PairCache.open(config.data.cache)
    cache.check(folder, config.data)
    identity = {"cache": cache.fingerprint, "start model": folder.fingerprint(("unet",))}
    check_output(config, identity, resume=resume)
    previews = Previews(config, folder, device) if config.preview.prompts else None
    unet = build_unet(config, folder, precision, device)
    store = CheckpointStore(config.train.output / "checkpoints", config.train.keep_checkpoints)
    checkpoint = store.newest() if resume else None
    trainer = Trainer(config, unet, cache, diffusion, precision, device, store, previews)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    claim_output(config, identity)
    log = RunLog(
        config.train.output, config.train.steps, console, start_step=trainer.step, wandb=config.train.wandb
    )
    with log, StopRequest() as stop:
        for note in _notes(config, cache, checkpoint, resume):
            log.warning(trainer.step, note)
        return trainer.run(log, stop, folder)


def _notes(config: Config, cache: PairCache, checkpoint: Checkpoint | None, resume: bool) -> list[str]:
    """What the user should know before the first step."""
    notes = []
    if resume and checkpoint is None:
        notes.append("nothing to resume yet: no checkpoint was written, starting at step 0")
    if checkpoint is not None:
        notes += [
            f"checkpoint {path.name} is damaged ({reason}): falling back to {checkpoint.path.name}"
            for path, reason in checkpoint.damaged
        ]
    if config.train.precision == "pure_bf16":
        notes.append(
            f"train.precision = 'pure_bf16' rounds updates to bf16: at lr {config.optim.lr:g} many are lost; "
            "'bf16' keeps fp32 weights"
        )
    if not cache.held_out:
        notes.append("no pair is held out (data.held_out): preference accuracy cannot be measured")
    return notes


class Trainer:
    """One run: its UNet, optimizer and position."""

    def __init__(
        self,
        config: Config,
        unet: Any,
        cache: PairCache,
        diffusion: Diffusion,
        precision: Precision,
        device: torch.device,
        store: CheckpointStore,
        previews: Previews | None,
    ) -> None:
        self.config, self.unet, self.cache, self.diffusion = config, unet, cache, diffusion
        self.precision, self.device, self.store, self.previews = precision, device, store, previews
        self.step = 0
        self.loss = build_loss(config.objective, diffusion.num_train_timesteps)
        self.batches = MicroBatches(cache.train, config.train.pairs_per_batch, config.train.seed)
        self.learning_rate = learning_rate(config.optim, config.train.steps)
        trainable = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = GuardedOptimizer(
            build_optimizer(config.optim, trainable),
            trainable,
            max_grad_norm=config.optim.max_grad_norm,
            scaler=torch.amp.GradScaler(device.type) if precision.scaled else None,
        )
        self.metrics = Metrics(device)
        held_out = cache.held_out[: config.train.evaluate_pairs]
        draws, seed = config.train.evaluate_draws, config.train.seed
        self.held_out = HeldOut(cache, held_out, diffusion, draws=draws, seed=seed, device=device)

    def run(self, log: RunLog, stop: StopRequest, folder: SDXLFolder) -> TrainResult:
        """Train to the last step or the first signal, then save."""
        config = self.config.train
        if self.step == 0:
            self._look(log, always=True)
        while self.step < config.steps and not stop.requested:
            self.metrics.add_step(self._step())
            log.advance(self.step)
            finished = self.step == config.steps
            if finished or stop.requested or self.step % config.log_every == 0:
                self._log(log)
            if stop.requested and not finished:
                break  # save first: an evaluation may take minutes
            self._look(log, always=finished)
            if finished or _due(self.step, config.checkpoint_every):
                self.save()
        finished = self.step >= config.steps
        if finished:
            self._export(folder)
        else:
            self.save()
        log.end(self.step, finished=finished)
        return TrainResult(config.output, self.step, finished, int(self.optimizer.skipped))

    def _step(self) -> Tensor:
        """One optimizer step; returns its 0-d gradient norm on the device."""
        config = self.config.train
        first = self.step * config.accumulation
        micro_batches = [self.batches.at(first + i) for i in range(config.accumulation)]
        total = sum(len(pairs) for _, pairs in micro_batches)
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        for epoch, pairs in micro_batches:
            inputs = training_inputs(
                self.cache,
                pairs,
                self.diffusion,
                seed=config.seed,
                epoch=epoch,
                caption_dropout=config.caption_dropout,
                device=self.device,
            )
            with self.precision.context(self.device):
                prediction = predict(self.unet, inputs)
            out = self.loss(prediction, inputs.target)
            self.optimizer.backward(out.loss * (len(pairs) / total))
            self.metrics.add(out)
        self.step += 1
        return self.optimizer.step()

    def _log(self, log: RunLog) -> None:
        """Fetch the interval's metrics (the one wait for the device) and write them."""
        figures, in_a_row = self.metrics.fetch(self.optimizer)
        figures["lr"] = self.learning_rate(self.step - 1)
        figures["peak_memory_mib"] = memory_mib(self.device)
        log.step(self.step, figures)
        limit = self.config.train.max_skipped_steps
        if in_a_row > limit:
            self.save()
            raise UserError(
                f"{in_a_row} steps in a row were not finite (train.max_skipped_steps = {limit}); the last "
                f"good weights are in {self.store.folder}. Lower optim.lr, or look for damaged data"
            )

    def _look(self, log: RunLog, *, always: bool) -> None:
        """Evaluate and preview where this step is due for it."""
        config = self.config
        context = self.precision.context(self.device)
        if self.held_out.pairs and (always or _due(self.step, config.train.evaluate_every)):
            errors = self.held_out.errors(self.unet, context)
            path = config.train.output / "held_out_start.safetensors"
            if self.step == 0:
                save_errors(errors, path)
            log.evaluation(self.step, compare(errors, load_errors(path)))
        if self.previews is not None and (always or _due(self.step, config.preview.every)):
            self.previews.write(self.unet, self.step, context)
        self.metrics.restart_clock()

    def _model_tensors(self) -> dict[str, Tensor]:
        if self.config.adapter.kind == "lora":
            return lora_state_dict(self.unet)
        return dict(self.unet.state_dict())

    def save(self) -> None:
        """Write a checkpoint of this step."""
        tensors, description = flatten_optimizer_state(self.optimizer.optimizer)
        scaler = self.optimizer.scaler
        state = {
            "optimizer": description,
            "seed": self.config.train.seed,
            "skipped": float(self.optimizer.skipped),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.store.save(self.step, {"model": self._model_tensors(), "optimizer": tensors}, state)
        self.metrics.restart_clock()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's weights, optimizer and position."""
        checkpoint.copy_into("model", self._model_tensors())
        restore_optimizer_state(
            self.optimizer.optimizer, checkpoint.views("optimizer"), checkpoint.state["optimizer"]
        )
        self.optimizer.skipped.fill_(checkpoint.state["skipped"])
        if self.optimizer.scaler is not None:
            self.optimizer.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step = checkpoint.step

    def _export(self, folder: SDXLFolder) -> None:
        """Write the result for plain diffusers, with the scheduler config it was trained under."""
        output = self.config.train.output
        if self.config.adapter.kind == "lora":
            save_lora(self.unet, output / "lora")
        else:
            save_unet(self.unet, output / "unet")
        (output / "scheduler").mkdir(exist_ok=True)
        write_json(output / "scheduler" / "scheduler_config.json", folder.scheduler_config)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
