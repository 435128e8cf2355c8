"""`mapo-fast prepare` and `mapo-fast train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mapo_fast.cli.app import allow, is_main
from mapo_fast.cli.options import Code, ConfigFile, LoraFiles, ModelPath, Overrides, UnetPath, VaePath, stated
from mapo_fast.util.console import Terminal, output_may_fail, say
from mapo_fast.util.signals import Interrupted, exit_code


def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelPath = None,
    unet: UnetPath = None,
    vae: VaePath = None,
    lora: LoraFiles = None,
    code: Code = None,
) -> None:
    """Encode images and prompts once into a cache; continues where it stopped."""
    from mapo_fast.data.prepare import prepare as run
    from mapo_fast.settings.load import load_config

    output_may_fail()
    allow(code, config)
    try:
        run(load_config(config, stated(overrides, model, unet, vae, lora)), callbacks=Terminal())
    except KeyboardInterrupt as signal:
        text = "interrupted; what is encoded is kept, the same command continues"
        raise Interrupted(getattr(signal, "number", 0), text) from None


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelPath = None,
    unet: UnetPath = None,
    vae: VaePath = None,
    lora: LoraFiles = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in train.output.")] = False,
    code: Code = None,
) -> None:
    """Fine-tune on a prepared cache; under accelerate launch or torchrun, on one GPU per process."""
    from mapo_fast.run.train import fit
    from mapo_fast.settings.load import load_config

    output_may_fail()
    allow(code, config)
    settings = load_config(config, stated(overrides, model, unet, vae, lora))
    result = fit(settings, resume=resume, callbacks=Terminal())
    main = is_main()
    if not result.finished:
        saved = result.saved_step
        if main:
            where = "before the first step" if saved is None else f"at step {saved}, saved"
            typer.echo(f"stopped {where}; continue with the same command and --resume", err=True)
        raise typer.Exit(exit_code(result.signal))
    if not main:
        return
    say(Terminal().console, f"finished: {result.step} steps; result in {result.model}, log in {result.log}")
