"""`mapo-fast prepare` and `mapo-fast train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mapo_fast.cli.app import allow, is_main
from mapo_fast.cli.options import (
    Code,
    ConfigFile,
    DataPath,
    LoraFiles,
    ModelPath,
    OutPath,
    Overrides,
    Preset,
    UnetPath,
    VaePath,
    Yes,
    some_settings,
    stated,
)
from mapo_fast.util.console import Terminal, output_may_fail
from mapo_fast.util.signals import Interrupted, exit_code

if TYPE_CHECKING:
    from mapo_fast.settings.schema import Config


def prepare(
    config: ConfigFile = None,
    preset: Preset = None,
    data: DataPath = None,
    overrides: Overrides = None,
    model: ModelPath = None,
    unet: UnetPath = None,
    vae: VaePath = None,
    lora: LoraFiles = None,
    yes: Yes = False,
    code: Code = None,
) -> None:
    """Encode images and prompts once into a cache; continues where it stopped. `train` does so itself."""
    from mapo_fast.run.ahead import check_prepare
    from mapo_fast.settings.load import load_config

    output_may_fail()
    some_settings(config, preset)
    allow(code, config)
    settings = load_config(config, stated(overrides, model, unet, vae, lora, data), preset=preset)
    check_prepare(settings, yes=yes)

    _prepare(settings, yes, Terminal())


def train(
    config: ConfigFile = None,
    preset: Preset = None,
    data: DataPath = None,
    out: OutPath = None,
    copy_to: Annotated[
        Path | None,
        typer.Option("--copy-to", help="Folder that the result's file is copied to, such as ComfyUI's."),
    ] = None,
    overrides: Overrides = None,
    model: ModelPath = None,
    unet: UnetPath = None,
    vae: VaePath = None,
    lora: LoraFiles = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run; alone, the only unfinished one in runs/."),
    ] = False,
    yes: Yes = False,
    code: Code = None,
) -> None:
    """Fine-tune on preference pairs, which are prepared first; under torchrun, on one GPU per process."""
    from mapo_fast.run.ahead import check_train
    from mapo_fast.run.result import check_folder, deliver
    from mapo_fast.settings.load import load_config

    output_may_fail()
    named = stated(overrides, model, unet, vae, lora, data, out)
    if resume and config is None and preset is None and model is None and data is None:
        from mapo_fast.run.unfinished import settings_of, unfinished

        settings = settings_of(unfinished(None if out is None else Path(out)), overrides or ())
    else:
        some_settings(config, preset)
        allow(code, config)
        settings = load_config(config, named, preset=preset)
    if copy_to is not None:
        check_folder(copy_to)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    unprepared = alone and check_train(settings, resume=resume, yes=yes)
    callbacks = Terminal()
    if unprepared:
        _prepare(settings, yes, callbacks)

    from mapo_fast.run.train import fit

    result = fit(settings, resume=resume, callbacks=callbacks)
    main = is_main()
    if not result.finished:
        saved = result.saved_step
        if main:
            where = "before the first step" if saved is None else f"at step {saved}, saved"
            typer.echo(f"stopped {where}; continue with the same command and --resume", err=True)
        raise typer.Exit(exit_code(result.signal))
    if not main:
        return
    callbacks.message(f"finished: {result.step} steps; result in {result.model}, log in {result.log}")
    for line in deliver(settings, result, copy_to):
        callbacks.message(line)


def _prepare(settings: Config, yes: bool, callbacks: Terminal) -> None:
    """Prepare the cache of a run."""
    from mapo_fast.data.prepare import prepare as run

    try:
        run(settings, yes=yes, callbacks=callbacks)
    except KeyboardInterrupt as signal:
        text = "interrupted; what is encoded is kept, the same command continues"
        raise Interrupted(getattr(signal, "number", 0), text) from None
