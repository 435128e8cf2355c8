"""Write a run's result for plain diffusers and other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mapo_fast import __version__
from mapo_fast.data.cache import PairCache
from mapo_fast.engine.processes import Processes
from mapo_fast.models.lora import save_kohya, save_lora
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.save import save_single_file
from mapo_fast.models.single_file import not_carried_over
from mapo_fast.run.card import write_card
from mapo_fast.run.folder import AVERAGE
from mapo_fast.run.metadata import lora_metadata_of, metadata_of, title_of
from mapo_fast.settings.places import result_name
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import save_unet
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, write_json
from mapo_fast.util.tensorparts import whole

SINGLE_FILE = "model.safetensors"
"""Name of a full fine-tune's single file in `train.output`."""
DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of weights in files, by their names in settings and on the command line."""


def export(
    config: Config,
    unet: Any,
    tensors: Mapping[str, Tensor],
    model: Pipeline,
    cache: PairCache,
    processes: Processes,
) -> list[str]:
    """Write the LoRA or the UNet, the scheduler config it was trained under, and the card to `train.output`.

    Args:
        config: the run's settings.
        unet: the trained UNet.
        tensors: trained tensors by name; each process passes its parts.
        model: the start model.
        cache: the training data.
        processes: the run's processes.

    Returns:
        A warning about a single file that could not be written; the UNet's folder exists nevertheless. Or one
        about text encoders or a VAE in another type than the start model's.
    """
    output = config.train.output
    complete = whole(tensors, keep=processes.main)

    def write() -> list[str]:
        notes: list[str] = []
        if config.adapter.kind == "lora":
            save_lora(unet, output / "lora", model.start, metadata=lora_metadata_of(config, model, output))
        else:
            save_unet(unet, output / "unet", complete)
            if config.export.single_file:
                notes = _write_single_file(config, model, complete)
        with disk_errors(output):
            (output / "scheduler").mkdir(exist_ok=True)
        write_json(output / "scheduler" / "scheduler_config.json", model.scheduler_config)
        write_card(config, model, cache, title_of(config, model))
        return notes

    return processes.once(write)


def export_average(config: Config, unet: Any, average: Mapping[str, Tensor], model: Pipeline) -> None:
    """Write the averaged LoRA or UNet into `ema/`, as the result is written.

    Args:
        config: the run's settings.
        unet: with the average in it.
        average: the average in fp32, by name.
        model: the start model.
    """
    folder = config.train.output / AVERAGE
    if config.adapter.kind == "lora":
        about = lora_metadata_of(config, model, config.train.output)
        save_lora(unet, folder / "lora", model.start, metadata=about)
    else:
        save_unet(unet, folder / "unet", average)


def export_step(config: Config, unet: Any, model: Pipeline, step: int) -> None:
    """Write the LoRA as it is after a step, for ComfyUI and A1111, into `exports/`.

    A resumed run that takes the step again writes the same file.
    """
    output, data = config.train.output, config.data.source or config.data.cache
    name = f"{result_name(config.model.path, data, output)}-step{step:06d}.safetensors"
    about = lora_metadata_of(config, model, output, step)
    save_kohya(unet, output / "exports" / name, model.start, metadata=about)


def _write_single_file(config: Config, model: Pipeline, unet: Mapping[str, Tensor]) -> list[str]:
    path = config.train.output / SINGLE_FILE
    try:
        said = metadata_of(config, model, config.train.output)
        save_single_file(model, path, dtype=DTYPES[config.export.dtype], unet=unet, metadata=said)
    except UserError as error:  # the trained weights are in unet/
        return [
            f"{SINGLE_FILE} was not written: {error}; mapo-fast export {config.train.output} "
            "--to single-file writes it from the run"
        ]
    note = not_carried_over(model, DTYPES[config.export.dtype])
    return [f"{SINGLE_FILE}: {note}"] if note else []


def about_checkpoint(config: Config, step: int) -> str:
    """The text of a checkpoint's `README.txt`: how to use the checkpoint."""
    train, lora = config.train, config.adapter.kind == "lora"
    return _ABOUT.format(
        step=step,
        steps=train.steps,
        output=train.output.absolute(),
        version=__version__,
        result="lora/" if lora else "unet/",
        holds="the LoRA's factors" if lora else "the whole UNet, under diffusers' names",
        use=_use(config, step),
    )


def _use(config: Config, step: int) -> str:
    """How to try a checkpoint."""
    adapter, base = config.adapter, config.model.path.absolute()
    if adapter.start is not None:  # its layers have scales of their own, and it may have text encoders
        return _USE_STARTED.format(output=config.train.output.absolute(), step=step)
    pipeline = f"from_{'single_file' if base.is_file() else 'pretrained'}({str(base)!r})"
    if adapter.kind == "full":
        return _USE_FULL.format(pipeline=pipeline)
    return _USE_LORA.format(pipeline=pipeline, scale=(adapter.alpha or adapter.rank) / adapter.rank)


_ABOUT = """\
A checkpoint of mapo-fast {version}: step {step} of {steps} of the run in
{output}

It is not the run's result. That is written to {result} in the run's folder after the last step.
To continue the run, repeat its command with --resume.

    model.safetensors      {holds}
    optimizer.safetensors  the optimizer's state
    state.json             run, step and counters; SHA-256 of itself and of the files above
    README.txt             this text, which no program reads

To try this step{use}"""

_USE_FULL = """\
 in diffusers, from this folder:

    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    pipe = StableDiffusionXLPipeline.{pipeline}
    pipe.unet.load_state_dict(load_file("model.safetensors"))
"""

_USE_LORA = """\
 in diffusers, from this folder:

    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    pipe = StableDiffusionXLPipeline.{pipeline}
    factors = {{"unet." + name: factor for name, factor in load_file("model.safetensors").items()}}
    pipe.load_lora_weights(factors, adapter_name="step")
    pipe.set_adapters("step", {scale})

Given the file itself, load_lora_weights loads nothing and does not say so: the names lack "unet.".
"""

_USE_STARTED = """\
, write it as a LoRA file. The factors alone lack the scales of their layers and the text encoders' part:

    mapo-fast export {output} --step {step} --to kohya --out step-{step}.safetensors
"""
