"""Pictures as A1111 writes them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, PngImagePlugin


def painted(
    path: Path,
    number: int,
    *,
    prompt: str | None = None,
    model: str = "model",
    sampler: str = "Euler",
    lora: str = "",
) -> Path:
    """A small picture with a colour of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if prompt is not None:
        said = f"{prompt} <lora:{lora}:1>" if lora else prompt
        info.add_itxt(
            "parameters",
            f"{said}\nSteps: 20, Sampler: {sampler}, CFG scale: 7, Seed: {number}, Model: {model}",
        )
    colour = (number * 37 % 256, number * 91 % 256, number // 256 % 256)
    Image.new("RGB", (8, 8), colour).save(path, pnginfo=info)
    return path
