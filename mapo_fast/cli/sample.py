"""`mapo-fast sample`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mapo_fast.cli.options import LoraFiles
from mapo_fast.util.console import Terminal, output_may_fail
from mapo_fast.util.errors import UserError
from mapo_fast.util.signals import Interrupted

_MOST_SEEDS = 10_000


def sample(
    model: Annotated[
        Path, typer.Argument(help="A .safetensors file, a pipeline folder, or the folder of a run.")
    ],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="File of prompts: .txt, .jsonl, .csv, .tsv, .parquet or .json.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the images; what it has is not made again.")],
    lora: LoraFiles = None,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Images of each prompt: seeds 0, 1, … of this number.")
    ] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps; 25 by default.")] = None,
    cfg: Annotated[
        float | None, typer.Option("--cfg", help="Guidance scale; 5 by default, 1 switches guidance off.")
    ] = None,
    rescale: Annotated[float | None, typer.Option("--rescale", help="CFG rescale, 0 to 1.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT; 1024x1024 by default.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", help="euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde or ddim."),
    ] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="normal or karras.")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="Negative prompt of all.")] = None,
    unconditional: Annotated[
        str | None,
        typer.Option(
            "--unconditional",
            help="Without --negative: zeros, or the encoded empty text (empty); else as the model says.",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", help="A picture of A1111 or ComfyUI, whose settings in its file are taken."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="comfyui: the settings of ComfyUI's own sampler.")
    ] = None,
) -> None:
    """Make images of prompts, with their settings listed; the same command goes on where it stopped."""
    from mapo_fast.data.picture_settings import PictureSettings, picture_settings
    from mapo_fast.data.prompt_files import read_prompts
    from mapo_fast.data.prompt_text import plain, remarks
    from mapo_fast.models.sampling import sampling
    from mapo_fast.settings.loras import parse_lora

    output_may_fail()
    if not 1 <= seeds <= _MOST_SEEDS:
        raise UserError(f"--seeds {seeds}: must be 1 to {_MOST_SEEDS:,}")
    stated: dict[str, Any] = {
        "steps": steps,
        "cfg": cfg,
        "rescale": rescale,
        "sampler": sampler,
        "schedule": schedule,
        "negative": negative,
        "unconditional": unconditional,
    }
    if size is not None:
        stated["width"], stated["height"] = _size(size)
    picture = PictureSettings({}, "") if like is None else picture_settings(like)
    how = sampling(preset, picture.values, {name: v for name, v in stated.items() if v is not None})
    text, notations = plain(how.negative)
    how = replace(how, negative=text)
    loras = [parse_lora("--lora", text) for text in lora or ()]
    found = read_prompts(prompts)
    callbacks = Terminal()
    of_negative = remarks([notations], "the negative prompt")
    for remark in filter(None, (*found.remarks, *of_negative, picture.remark)):
        callbacks.warning(remark)

    from mapo_fast.score.sample import open_for_sampling
    from mapo_fast.score.sample import sample as run

    opened = open_for_sampling(model, loras)
    try:
        made = run(opened, found.texts, range(seeds), how, out, callbacks)
    except KeyboardInterrupt as signal:
        text = "interrupted; the images that are listed are kept, the same command goes on"
        raise Interrupted(getattr(signal, "number", 0), text) from None
    total = len(found.texts) * seeds
    callbacks.message(f"{total} images in {out}" + ("" if made == total else f", {made} of them new"))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    if match is None:
        raise UserError(f"--size {text!r}: write WIDTHxHEIGHT in pixels, such as 832x1216")
    return int(match[1]), int(match[2])
