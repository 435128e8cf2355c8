"""A small project folder: drawings of three colours for each prompt, with the prompt beside or inside."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 40, 200)}


def write_picture(path: Path, colour: tuple[int, int, int], prompt: str = "") -> Path:
    """A picture, with A1111's text where a prompt is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    if prompt:
        text.add_itxt(
            "parameters", f"{prompt}\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
        )
    Image.new("RGB", (64, 64), colour).save(path, pnginfo=text)
    return path


def write_project(folder: Path, prompts: int = 3) -> Path:
    """Three pictures of each prompt; the last prompt's are named by text files."""
    for number in range(prompts):
        for index, (name, colour) in enumerate(COLOURS.items()):
            shade = tuple(min(255, value + number) for value in colour)
            inside = number < prompts - 1
            path = folder / f"{number:03d}" / f"{name}-{index}.png"
            write_picture(path, shade, f"prompt {number}" if inside else "")  # type: ignore[arg-type]
            if not inside:
                path.with_suffix(".txt").write_text(f"prompt {number}", encoding="utf-8")
    return folder
