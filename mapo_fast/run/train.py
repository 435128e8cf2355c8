"""`mapo-fast train`: everything is checked, loaded and claimed in this order, then the `Trainer` runs.

Nothing is written before the settings, the model folder, the cache and the output folder have all been found
good. Loading takes minutes, in which another process may have taken the output folder: it is held and checked
again before the first write, and only then is the checkpoint to resume from looked for.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mapo_fast.data.buckets import make_buckets
from mapo_fast.data.cache import PairCache
from mapo_fast.engine.batches import most_frequent
from mapo_fast.engine.build import build_unet
from mapo_fast.engine.precision import choose_device, choose_precision, cpu_threads
from mapo_fast.engine.processes import Processes, environment, joined
from mapo_fast.hardware.driver import why_no_gpu
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.open import introduce, open_model
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.start import with_start
from mapo_fast.planner.kernels import compiling
from mapo_fast.run.adopt import adopt, start_identity
from mapo_fast.run.ahead import check_kind
from mapo_fast.run.budget import is_planned
from mapo_fast.run.facts import start_facts
from mapo_fast.run.folder import (
    START,
    FitResult,
    check_output,
    check_results,
    claim_output,
    recorded_settings,
    remove_leftovers,
)
from mapo_fast.run.forecast import forecast, with_steps
from mapo_fast.run.health import check_start
from mapo_fast.run.log import RunLog
from mapo_fast.run.mirrors import find_wandb
from mapo_fast.run.notes import earlier_checkpoint, notes_of
from mapo_fast.run.precompute import precompute
from mapo_fast.run.preview import Previews
from mapo_fast.run.settings import final_settings, with_model
from mapo_fast.run.starts import keep_settings
from mapo_fast.run.trainer import Trainer
from mapo_fast.settings.load import expect_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, exclusive
from mapo_fast.util.progress import Callbacks
from mapo_fast.util.signals import StopNow, StopRequest
from mapo_kernels import backend


def fit(config: Config, *, resume: bool = False, callbacks: Callbacks | None = None) -> FitResult:
    """Fine-tune as `config` says, on the cache of `prepare`.

    Args:
        config: all settings.
        resume: continue the run in `train.output`, or start it there.
        callbacks: called with progress; without them the run is silent.

    Returns:
        Where the run ended. In the main thread the first Ctrl-C or SIGTERM stops the run after the step under
        way, as does a file `stop` in `train.output`; it saves and returns with `finished` false.

    Raises:
        UserError: the config, the model, the cache or the output folder has an error.
        MachineError: the disk or the memory failed; the last finished step is saved if possible.
        FailedRunError: the model diverged, or too many steps were skipped.
        KeyboardInterrupt: a second signal, or a signal before the first step.
    """
    expect_config(config)
    processes = environment()
    if config.train.wandb is not None:
        find_wandb()
    device = choose_device(config.train, processes)
    callbacks = (callbacks if processes.main else None) or Callbacks()
    with cpu_threads(config.train.threads), joined(processes, device):
        return _load_and_run(config, device, processes, resume, callbacks)


def _load_and_run(
    config: Config, device: torch.device, processes: Processes, resume: bool, callbacks: Callbacks
) -> FitResult:
    """Check everything and load it, before anything is written."""
    folder = open_model(config)
    introduce(folder, callbacks)
    config = with_start(config, folder.start, folder.parts["unet"])
    cache = _open_cache(config, folder)
    config = with_steps(config, cache, processes.size)
    where = f"{processes.size} × {device.type}" if processes.size > 1 else str(device)
    callbacks.message(f"training on {where} ({back_end(device)})")
    if is_planned(config, device, processes):
        callbacks.message("planning memory; the first time on a machine this takes a minute or two")
    recorded = recorded_settings(config.train.output) if resume else None
    config, budget = final_settings(config, device, processes, model=lambda: folder, recorded=recorded)
    callbacks.message(forecast(config, budget))
    precision = choose_precision(config, device)
    diffusion = Diffusion(folder.scheduler_config)
    store = CheckpointStore(config.train.output / "checkpoints", config.train.keep_checkpoints)
    identity = processes.once(lambda: _identity(config.train.output, folder, cache))
    processes.once(lambda: check_output(config, identity, resume=resume, processes=processes.size))
    with nullcontext() if budget is None else budget.kept():
        sampling = config.preview.prompts and (processes.main or processes.shard(config))
        previews = Previews(config, folder, device, most_frequent(cache.train)) if sampling else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the plan does not count text encoders
        buckets = make_buckets(config.data.resolution, config.data.bucket_step)
        with compiling(config, folder.config("unet"), buckets, device) as kernels:
            if kernels:
                callbacks.message(f"compiling kernels: {kernels} of them, while the weights load")
            parts = build_unet(config, folder, precision, device, processes)
        stop = StopRequest(config.train.output)
        trainer = Trainer(
            config, parts, cache, diffusion, precision, device, store, previews, stop, processes
        )
        notes = [] if budget is None else budget.notes()
        facts = start_facts(device, budget)
        return _claim_and_run(trainer, folder, identity, resume, notes, facts, callbacks)


def back_end(device: torch.device) -> str:
    """The implementation that computes, with the reason where it is not the GPU's kernels."""
    if device.type == "cuda":
        return str(backend(device))
    if torch.cuda.is_available():
        return "train.device = 'cpu'"
    return f"torch sees no NVIDIA GPU: {why_no_gpu()}"


def _open_cache(config: Config, folder: Pipeline) -> PairCache:
    """The cache of a run.

    Raises:
        UserError: the cache was made for another model, other settings or another kind of objective.
    """
    cache = PairCache.open(config.data.cache)
    cache.check(folder, config.data)
    check_kind(config.objective, cache.paired, f"data.cache {config.data.cache}")
    if config.objective.known.labels == "required" and not cache.labelled:
        raise UserError(
            f"objective.name = {config.objective.name!r} needs a soft label for every pair, data.cache "
            f"{config.data.cache} has not: give each line of pairs.jsonl a 'label', how probably the chosen "
            "image is the better one (0 to 1), and run mapo-fast prepare again"
        )
    return cache


def _identity(output: Path, folder: Pipeline, cache: PairCache) -> dict[str, str]:
    """Fingerprints of the run's inputs: cache, start model, noise schedule."""
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
    """The checkpoint to continue from."""
    notes: list[str]


def _claim(
    config: Config,
    folder: Pipeline,
    identity: dict[str, str],
    store: CheckpointStore,
    resume: bool,
    processes: int,
    held: ExitStack,
) -> _Claimed:
    """Hold the output folder, check it once more, and find the checkpoint to continue from.

    Raises:
        UserError: the folder is in use, or holds something else, another run or this one's results.
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
    notes += keep_settings(with_model(config, folder), store.run, step=step, processes=processes)
    if checkpoint is None:
        check_results(output)
    else:
        store.tidy(checkpoint.step)
    return _Claimed(store.run, checkpoint, notes)


def _claim_and_run(
    trainer: Trainer,
    folder: Pipeline,
    identity: dict[str, str],
    resume: bool,
    notes: list[str],
    facts: dict[str, Any],
    callbacks: Callbacks,
) -> FitResult:
    """Claim the output folder and train, from the checkpoint if there is one."""
    config, processes = trainer.config, trainer.processes
    output = config.train.output
    if not resume:
        check_start(trainer.healthy(), folder.where("unet"), config.train.precision)
    with ExitStack() as held:
        run, checkpoint, found = processes.once(
            lambda: _claim(config, folder, identity, trainer.store, resume, processes.size, held)
        )
        held.enter_context(trainer.stop)
        try:
            notes += found + trainer.looks.measure_start(output / START, run)
            notes += filter(None, [trainer.looks.best.note])
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
                earlier=partial(earlier_checkpoint, config, trainer.store),
                facts=facts,
            )
            held.enter_context(log)
            for note in notes + notes_of(config, trainer.cache, checkpoint, resume, processes.size):
                log.warning(trainer.step, note)
        return trainer.run(log, folder)
