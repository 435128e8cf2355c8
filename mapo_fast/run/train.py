"""`mapo-fast train`: everything is checked, loaded and claimed in this order, then the `Trainer` runs.

Nothing is written before the settings, the model folder, the cache and the output folder have all been found
good. Loading takes minutes, in which another process may have taken the output folder: it is held and checked
again before the first write, and only then is the checkpoint to resume from looked for.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from mapo_fast.data.buckets import make_buckets
from mapo_fast.data.cache import PairCache
from mapo_fast.engine.build import build_unet
from mapo_fast.engine.gradient_sums import kept_to_nearest
from mapo_fast.engine.precision import choose_device, choose_precision
from mapo_fast.engine.processes import Processes, environment, joined
from mapo_fast.hardware.driver import why_no_gpu
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.open import introduce, open_model
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.planner.kernels import compiling
from mapo_fast.run.adopt import adopt, start_identity
from mapo_fast.run.budget import is_planned
from mapo_fast.run.folder import (
    START,
    TrainResult,
    check_output,
    check_results,
    claim_output,
    recorded_settings,
    remove_leftovers,
)
from mapo_fast.run.health import check_start
from mapo_fast.run.log import RunLog
from mapo_fast.run.mirrors import find_wandb
from mapo_fast.run.precompute import precompute
from mapo_fast.run.preview import Previews
from mapo_fast.run.settings import final_settings
from mapo_fast.run.starts import keep_settings
from mapo_fast.run.trainer import Trainer
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, exclusive
from mapo_fast.util.progress import Callbacks
from mapo_fast.util.signals import StopNow, StopRequest
from mapo_kernels import backend
from mapo_kernels.objectives import OBJECTIVES


def train(config: Config, *, resume: bool = False, callbacks: Callbacks | None = None) -> TrainResult:
    """Fine-tune as `config` says; `callbacks` are told how it goes.

    The result stands at `<train.output>/unet` (full) or `<train.output>/lora`.

    Raises:
        UserError: anything wrong with the config, the model folder, the cache or the output folder.
    """
    processes = environment()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.train.wandb is not None:
        find_wandb()
    device = choose_device(config.train, processes)
    callbacks = (callbacks if processes.main else None) or Callbacks()
    with joined(processes, device):
        return _train(config, device, processes, resume, callbacks)


def _train(
    config: Config, device: torch.device, processes: Processes, resume: bool, callbacks: Callbacks
) -> TrainResult:
    folder = open_model(config)
    introduce(folder, callbacks)
    where = f"{processes.size} × {device.type}" if processes.size > 1 else str(device)
    callbacks.message(f"training on {where} ({back_end(device)})")
    if is_planned(config, device, processes):
        callbacks.message("planning memory; the first time on a machine this takes a minute or two")
    recorded = recorded_settings(config.train.output) if resume else None
    config, budget = final_settings(config, device, processes, model=lambda: folder, recorded=recorded)
    precision = choose_precision(config, device)
    diffusion = Diffusion(folder.scheduler_config)
    cache = _open_cache(config, folder)
    store = CheckpointStore(config.train.output / "checkpoints", config.train.keep_checkpoints)
    identity = processes.once(lambda: _identity(config.train.output, folder, cache))
    processes.once(lambda: check_output(config, identity, resume=resume, processes=processes.size))
    with nullcontext() if budget is None else budget.kept():
        sampling = config.preview.prompts and (processes.main or processes.shard(config))
        previews = Previews(config, folder, device) if sampling else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # text encoders are gone and are not the plan's
        buckets = make_buckets(config.data.resolution, config.data.bucket_step)
        with compiling(config, folder.config("unet"), buckets, device) as kernels:
            if kernels:
                callbacks.message(f"compiling kernels: {kernels} of them, while the weights load")
            parts = build_unet(config, folder, precision, device, processes)
        stop = StopRequest()
        trainer = Trainer(
            config, parts, cache, diffusion, precision, device, store, previews, stop, processes
        )
        notes = [] if budget is None else budget.notes()
        return _run(trainer, folder, identity, resume, notes, callbacks)


def back_end(device: torch.device) -> str:
    """What computes, and where that is not the GPU's kernels why."""
    if device.type == "cuda":
        return str(backend(device))
    if torch.cuda.is_available():
        return "train.device = 'cpu'"
    return f"torch sees no NVIDIA GPU: {why_no_gpu()}"


def _open_cache(config: Config, folder: Pipeline) -> PairCache:
    """The cache of a run.

    Raises:
        UserError: it was made for another model, other settings or another kind of objective.
    """
    cache = PairCache.open(config.data.cache)
    cache.check(folder, config.data)
    if (config.objective.known.samples == "pair") != cache.paired:
        wants, has = "pairs (chosen, rejected)", "single labelled images (image, label)"
        others = [repr(name) for name, known in OBJECTIVES.items() if known.samples == "single"]
        other = f"objective.name = {' or '.join(others)}"
        if cache.paired:
            wants, has, other = has, wants, "another objective.name"
        raise UserError(
            f"objective.name = {config.objective.name!r} learns from {wants}, data.cache {config.data.cache} "
            f"holds {has}: use {other}, or prepare another data.source into another data.cache"
        )
    if config.objective.known.labels == "required" and not cache.labelled:
        raise UserError(
            f"objective.name = {config.objective.name!r} needs a soft label for every pair, data.cache "
            f"{config.data.cache} has not: give each line of pairs.jsonl a 'label', how probably the chosen "
            "image is the better one (0 to 1), and run mapo-fast prepare again"
        )
    return cache


def _identity(output: Path, folder: Pipeline, cache: PairCache) -> dict[str, str]:
    """Fingerprints of what the run is made from."""
    schedule = json.dumps(folder.scheduler_config, sort_keys=True)
    return {
        "cache": cache.fingerprint,
        "start model": start_identity(output, folder),
        "noise schedule": hashlib.sha256(schedule.encode()).hexdigest(),
    }


class _Claimed(NamedTuple):
    run: str
    """The run's id."""
    checkpoint: Checkpoint | None
    """What to go on from."""
    notes: list[str]


def _claim(
    config: Config,
    identity: dict[str, str],
    store: CheckpointStore,
    resume: bool,
    processes: int,
    held: ExitStack,
) -> _Claimed:
    """Hold the output folder, find it fit once more, and find the checkpoint to go on from.

    Raises:
        UserError: it is in use, or holds something else, another run or this one's results.
    """
    output = config.train.output
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    held.enter_context(exclusive(output))
    check_output(config, identity, resume=resume, processes=processes)
    remove_leftovers(output)
    notes = adopt(config, identity, store)
    store.run = claim_output(config, identity, processes)
    checkpoint = store.newest()
    step = 0 if checkpoint is None else checkpoint.step
    notes += keep_settings(config, store.run, step=step, processes=processes)
    if checkpoint is None:
        check_results(output)
    else:
        store.tidy(checkpoint.step)
    return _Claimed(store.run, checkpoint, notes)


def _run(
    trainer: Trainer,
    folder: Pipeline,
    identity: dict[str, str],
    resume: bool,
    notes: list[str],
    callbacks: Callbacks,
) -> TrainResult:
    """Claim the output folder and train, from the checkpoint if there is one."""
    config, processes = trainer.config, trainer.processes
    output = config.train.output
    if not resume:
        check_start(trainer.healthy(), folder.where("unet"), config.train.precision)
    with ExitStack() as held:
        run, checkpoint, found = processes.once(
            lambda: _claim(config, identity, trainer.store, resume, processes.size, held)
        )
        held.enter_context(trainer.stop)
        try:
            notes += found + trainer.looks.measure_start(output / START, run)
            if config.reference == "precomputed":
                precompute(trainer, run, identity, callbacks)
                assert trainer.feed.reference is not None
                notes += [f"{reason}: computed again" for reason in trainer.feed.reference.refused]
        except StopNow:
            trainer.saved_step = checkpoint.step if checkpoint else None
            return trainer.result(trainer.saved_step or 0, finished=False)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        log = None
        if processes.main:
            log = RunLog(
                output,
                config.train.steps,
                callbacks,
                start_step=trainer.step,
                wandb=config.train.wandb,
                run=run,
            )
            held.enter_context(log)
            for note in notes + _notes(config, trainer.cache, checkpoint, resume, processes.size):
                log.warning(trainer.step, note)
        return trainer.run(log, folder)


def _notes(
    config: Config, cache: PairCache, checkpoint: Checkpoint | None, resume: bool, processes: int
) -> list[str]:
    """What the user should know before the first step."""
    notes = []
    if config.speed.cuda_graph:
        notes.append(
            "speed.cuda_graph keeps a step's memory reserved: the memory plan counts that once, and not what "
            "graphs of several image shapes cannot share; set it to false if memory runs out"
        )
    if resume and checkpoint is None:
        notes.append("nothing to resume yet: no checkpoint was written, starting at step 0")
    if checkpoint is not None:
        if checkpoint.step == config.train.steps:
            notes.append(f"the run is finished already: all {checkpoint.step} steps are done")
        notes += [
            f"checkpoint {path.name} cannot be used ({reason}): falling back to {checkpoint.path.name}"
            for path, reason in checkpoint.passed_over
        ]
    if config.train.precision == "pure_bf16" and not OPTIMIZERS[config.optim.name].rounds_stochastically:
        others = " or ".join(repr(name) for name, known in OPTIMIZERS.items() if known.rounds_stochastically)
        notes.append(
            f"train.precision = 'pure_bf16' rounds updates to bf16: at lr {config.optim.lr:g} many are lost; "
            f"optim.name = {others} rounds stochastically and keeps them on average"
        )
    accumulation = config.train.accumulation
    split = config.train.shard and processes > 1
    if config.train.precision == "pure_bf16" and split and (kept := kept_to_nearest(accumulation)) < 0.99:
        notes.append(
            f"train.shard adds the gradients of train.accumulation = {accumulation} micro-batches in bf16, "
            f"to nearest: of noisy ones about {kept:.0%} of the sum is kept. Use fewer, or train.precision = "
            "'bf16'"
        )
    if config.optim.warmup_steps >= config.train.steps:
        notes.append(
            f"optim.warmup_steps = {config.optim.warmup_steps} is not less than train.steps: the learning "
            "rate never reaches optim.lr"
        )
    samples = 2 * config.train.pairs_per_batch * config.train.accumulation * processes
    if config.objective.known.baseline and samples < 8:
        notes.append(
            f"a step has {samples} images, and {config.objective.name!r} compares each with their mean: of "
            "fewer than 8 that is mostly noise. Raise train.pairs_per_batch (2 images each) or "
            "train.accumulation"
        )
    if not cache.held_out:
        what = (
            "pair is held out (data.held_out): preference accuracy"
            if cache.paired
            else ("image is held out (data.held_out): the change on new ones")
        )
        notes.append(f"no {what} cannot be measured")
    return notes
