"""Notes to show before a run's first step, and the command to type where a run goes wrong."""

from __future__ import annotations

from mapo_fast.data.cache import PairCache
from mapo_fast.data.prompt_text import plain, remarks
from mapo_fast.engine.gradient_sums import kept_to_nearest
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.console import command_line


def notes_of(
    config: Config, cache: PairCache, checkpoint: Checkpoint | None, resume: bool, processes: int
) -> list[str]:
    """Notes to show before the first step."""
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
    notes += remarks([plain(prompt)[1] for prompt in config.preview.prompts], "preview.prompts")
    if not cache.held_out:
        what = (
            "pair is held out (data.held_out): preference accuracy"
            if cache.paired
            else ("image is held out (data.held_out): the change on new ones")
        )
        notes.append(f"no {what} cannot be measured")
    return notes


def earlier_checkpoint(config: Config, store: CheckpointStore) -> str:
    """How to take the newest checkpoint, as the end of a sentence."""
    steps = [step for step, _ in store.found()]
    if not steps:
        return "stop here (no checkpoint is written yet: see train.checkpoint_every)"
    step, lora = max(steps), config.adapter.kind == "lora"
    command = ["mapo-fast", "export", str(config.train.output), "--step", str(step)]
    command += ["--to", "kohya" if lora else "single-file", "--out", f"step-{step}.safetensors"]
    return f"take the checkpoint of step {step}, while it is kept: {command_line(command)}"
