"""The `mapo-fast` command: any error is one line on stderr, never a stack trace.

Exit codes: 0 done · 1 the machine failed (disk, I/O, memory) · 2 wrong input or settings · 3 no plan fits ·
130 (Ctrl-C), 143 (SIGTERM) and 129 (the terminal was closed) stopped, and finished work is saved.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mapo_fast.cli.app import Configured, allow, app, is_main
from mapo_fast.cli.evaluate import evaluate
from mapo_fast.cli.options import (
    Code,
    ConfigFile,
    DataPath,
    LoraFiles,
    ModelPath,
    Overrides,
    Preset,
    UnetPath,
    VaePath,
    some_settings,
    stated,
)
from mapo_fast.cli.report import report as report_command
from mapo_fast.cli.sample import sample
from mapo_fast.cli.studio import studio
from mapo_fast.cli.training import prepare, train
from mapo_fast.util.console import Terminal, encode_anything, output_may_fail, say
from mapo_fast.util.errors import printable
from mapo_fast.util.files import one_line

_LIBRARIES = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}

_PATIENCE = 10.0
"""Seconds that another process of a run waits for the first one to report an error for both."""


app.command(cls=Configured)(prepare)
app.command(cls=Configured)(train)
app.command()(sample)
app.command()(evaluate)
app.command(name="report")(report_command)
app.command()(studio)


@app.command(cls=Configured)
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; its settings are kept. Without it, those of --preset.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="`lora` by default, or another recipe's name.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="An SDXL model; `sdxl`, by default, needs no file.")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option("--resolution", help="Side of the images in pixels.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="`full` or `lora`.")] = None,
    vram: Annotated[str | None, typer.Option("--vram", help="GPU memory in GiB, such as 24.")] = None,
    card: Annotated[str | None, typer.Option("--card", help='The card, such as "RTX 4090".')] = None,
    ram: Annotated[str, typer.Option("--ram", help="Free system RAM in GiB.")] = "32",
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw memory over the step into this file.")
    ] = None,
    code: Code = None,
) -> None:
    """Say whether training fits a card, how long it takes, and what to type. No GPU, no weights."""
    from mapo_fast.hardware.holders import gpus
    from mapo_fast.planner import report
    from mapo_fast.planner.answer import plan as ask
    from mapo_fast.planner.question import question
    from mapo_fast.util.errors import UserError

    if resolution is not None and not resolution.isdecimal():
        raise UserError(f"--resolution {resolution!r} is not a number of pixels: write --resolution 1024")
    allow(code, config)
    given = {"data.resolution": resolution, "adapter.kind": adapter}
    named = [*(overrides or ()), *(f"{name}={value}" for name, value in given.items() if value is not None)]
    settings, run = question(config, preset, named, model)
    if picture is not None:
        from mapo_fast.planner.picture import check_picture

        check_picture(picture)
    from rich.console import Console

    with Console(stderr=True).status("looking for the fastest plan that fits") as status:
        found = ask(
            settings,
            card=card,
            vram=vram,
            ram=ram,
            model=model,
            traced=picture is not None,
            progress=lambda made, asked: status.update(f"training steps traced: {made} of {asked}"),
        )
    if as_json:
        typer.echo(report.as_json(found, run))
    for line in () if as_json else report.as_text(found, run).split("\n"):
        typer.echo(printable(line))
    if not (card or vram or settings.train.vram or as_json):
        for note in (report.held_note(found, gpu) for gpu in gpus()[:1]):
            typer.echo(printable(f"\n{note}") if note else "")
    if found.chosen is None:
        raise typer.Exit(3)
    if picture is not None:
        from mapo_fast.planner.picture import plot

        plot(found, picture)


@app.command(cls=Configured)
def show(
    config: ConfigFile = None,
    preset: Preset = None,
    data: DataPath = None,
    overrides: Overrides = None,
    model: ModelPath = None,
    unet: UnetPath = None,
    vae: VaePath = None,
    lora: LoraFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    code: Code = None,
) -> None:
    """Print the settings as a new run on this machine has them, each with where it comes from."""
    from mapo_fast.settings import view
    from mapo_fast.settings.load import load_config

    some_settings(config, preset)
    allow(code, config)
    settings = load_config(config, stated(overrides, model, unet, vae, lora, data), preset=preset)
    from rich.console import Console

    from mapo_fast.run.settings import look

    with Console(stderr=True).status("planning memory; the first time this takes a minute or two"):
        seen = look(settings)
    if as_json:
        typer.echo(json.dumps(view.as_json(seen.settings), indent=1))
    console = Console()
    for line, style in () if as_json else view.as_text(seen.settings):
        say(console, line, style)
    if seen.unplanned:
        typer.echo(printable(f"no memory plan yet: {seen.unplanned}"), err=True)
    if seen.refused is not None:
        raise seen.refused


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the report and everything it is made of.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the whole demo.")] = 0,
    objective: Annotated[
        str, typer.Option("--objective", help="objective.name of what is compared with the SFT control.")
    ] = "mapo",
    overrides: Overrides = None,
) -> None:
    """Fine-tune a tiny SDXL on drawn preferences and show what changed. Needs no GPU and no download."""
    from rich.console import Console

    from mapo_fast.demo.run import run_demo

    output_may_fail()
    run_demo(out, seed=seed, console=Console(), objective=objective, overrides=overrides or ())


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(help="A run's folder, finished or not, a LoRA's file, or a model's file or folder."),
    ],
    to: Annotated[str, typer.Option("--to", help="`single-file`, `diffusers`, `kohya` or `peft`.")],
    out: Annotated[Path, typer.Option("--out", help="The file or folder to write.")],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The model a LoRA is for; a run's start model, if it has moved."),
    ] = None,
    tokenizers: Annotated[
        Path | None,
        typer.Option(
            "--tokenizers", help="With --to diffusers: a folder with tokenizer/ and tokenizer_2/, not CLIP's."
        ),
    ] = None,
    merge: Annotated[
        float | None, typer.Option("--merge", help="Add the LoRA at this weight to the base, and write that.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="`auto`, `fp16`, `bf16` or `fp32`.")] = "auto",
    step: Annotated[int | None, typer.Option("--step", help="Of a run: take this checkpoint.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Of a run: take its best step (train.best).")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Of a run: take the average of its weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write no metadata into the file.")
    ] = False,
    code: Code = None,
) -> None:
    """Write a run's result, a LoRA or a model for ComfyUI and A1111, diffusers or peft."""
    from mapo_fast.run.convert import convert

    if best and ema:
        raise typer.BadParameter("--best and --ema name two models: leave one out")
    allow(code, None)
    convert(
        source,
        to,
        out,
        base=base,
        tokenizers=tokenizers,
        merge=merge,
        dtype=dtype,
        step=step,
        which="best" if best else "ema" if ema else "",
        force=force,
        with_metadata=not no_metadata,
        callbacks=Terminal(),
    )


@app.command()
def doctor(
    model: Annotated[
        Path | None, typer.Argument(help="Say what this model is instead: a .safetensors file or a folder.")
    ] = None,
) -> None:
    """Print versions, the GPU, and which kernels and attention back ends will be used and why."""
    from rich.console import Console

    from mapo_fast.doctor import doctor as run

    run(Console(), model)


def main() -> None:
    """Entry point of the `mapo-fast` script and of `python -m mapo_fast`."""
    # Nothing here is ever fetched from a hub, and the libraries' loading bars would bury our own output.
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)
    encode_anything()
    try:
        app()
    except Exception as caught:
        error = one_line(caught)
        if error is None:
            raise
        if not is_main():  # once the first process has ended, its launcher ends this one
            time.sleep(_PATIENCE)
        if not error.reported:
            print(f"mapo-fast: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
