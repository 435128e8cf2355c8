"""Options that several commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mapo_fast.settings.presets import PRESETS
from mapo_fast.util.errors import UserError

ConfigFile = Annotated[Path | None, typer.Argument(help="TOML file; see recipes/ for commented ones.")]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help=f"Settings of a recipe: {', '.join(PRESETS)}. A config file goes over it."),
]
DataPath = Annotated[
    str | None, typer.Option("--data", help="Folder or file of the preference pairs (data.source).")
]
OutPath = Annotated[
    str | None,
    typer.Option("--out", help="Folder of the run (train.output); runs/MODEL-DATA by default."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace one setting: section.key=value (see below). May be repeated."),
]
Code = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        help="Call module:function of an installed package, which adds objectives, optimizers or data "
        "sources. May be repeated.",
    ),
]


Yes = Annotated[
    bool,
    typer.Option("--yes", help='The pairs that data.pair_by = "order" makes are right: go on with them.'),
]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", help="SDXL model: a .safetensors file or a pipeline folder (model.path)."),
]
UnetPath = Annotated[
    str | None, typer.Option("--unet", help="Another UNet, a folder or a file (model.unet).")
]
LoraFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", help="LoRA added to the model, FILE or FILE=WEIGHT (model.lora). May be repeated."
    ),
]
VaePath = Annotated[str | None, typer.Option("--vae", help="Another VAE, a folder or a file (model.vae).")]


def stated(
    overrides: list[str] | None,
    model: str | None,
    unet: str | None,
    vae: str | None,
    loras: list[str] | None,
    data: str | None = None,
    out: str | None = None,
) -> list[str]:
    """Overrides of settings from `--set` and from the options that name a model, data and output."""
    named = {
        "model.path": model,
        "model.unet": unet,
        "model.vae": vae,
        "model.lora": loras or None,
        "data.source": data,
        "train.output": out,
    }
    texts = [f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in named.items() if v is not None]
    return [*(overrides or ()), *texts]


def some_settings(config: Path | None, preset: str | None) -> None:
    """Raise where a command has neither a config nor a preset.

    Raises:
        UserError: neither is given.
    """
    if config is None and preset is None:
        raise UserError(
            f"which settings? Name a recipe, such as --preset lora ({', '.join(PRESETS)}), or a config file"
        )
