"""Options that several commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="TOML file; see recipes/ for commented ones.")]
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
) -> list[str]:
    """`--set` and the options that name a model, as overrides of settings."""
    named = {"model.path": model, "model.unet": unet, "model.vae": vae, "model.lora": loras or None}
    texts = [f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in named.items() if v is not None]
    return [*(overrides or ()), *texts]
