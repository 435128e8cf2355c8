"""Files of previews: names by prompt, settings within the PNG, and a contact sheet of all steps."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mapo_fast.data.prompt_text import plain
from mapo_fast.settings.schema import Config
from mapo_fast.util.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""Height and width in pixels."""

CONTACT_SHEET = "contact-sheet.png"
_LONGEST_NAME = 40
_CELL = 192
"""Longest side of an image in the contact sheet, in pixels."""
_MOST_COLUMNS = 16
"""Most steps in a contact sheet; of more, evenly spaced ones, the first and the last included."""


def previews_folder(config: Config) -> Path:
    """The folder of a run that holds a folder for each previewed step."""
    return config.train.output / "previews"


def step_folder(config: Config, step: int) -> Path:
    """The folder of one step's previews."""
    return previews_folder(config) / f"step-{step:08d}"


def file_name(index: int, prompt: str, size: Size, side: int, what: str = "") -> str:
    """Name of a preview: number, words of the prompt, the size unless it is `side` × `side`, and `what`.

    Example: `00-a-portrait-of-an-old-sailor.png`, `00-a-portrait-of-an-old-sailor-832x1216.png`.
    """
    height, width = size
    parts = [f"{index:02d}", words(prompt), "" if size == (side, side) else f"{width}x{height}", what]
    return "-".join(filter(None, parts)) + ".png"


def words(prompt: str) -> str:
    """The first words of a prompt, as part of a file's name."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", plain))[:_LONGEST_NAME].rstrip("-")


def texts(config: Config) -> list[str]:
    """The prompts as they are encoded, and as `mapo-fast sample` reads them."""
    return [plain(prompt)[0] for prompt in config.preview.prompts]


def jobs(config: Config, sizes: Sequence[Size], what: str = "") -> Iterator[tuple[int, Size, str]]:
    """Prompt number, size and file name of each preview of a step, size after size; see `file_name`."""
    for size in sizes:
        for index, prompt in enumerate(texts(config)):
            yield index, size, file_name(index, prompt, size, config.data.resolution, what)


def save(image: Image, path: Path, config: Config, index: int, step: int) -> None:
    """Write a PNG with its settings, in the form that A1111 and ComfyUI's tools read (`parameters`).

    Raises:
        OSError: the disk is full or cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    preview, width, height = config.preview, *image.size
    text = PngInfo()
    text.add_itxt(
        "parameters",
        f"{texts(config)[index]}\nSteps: {preview.steps}, Sampler: Euler, CFG scale: {preview.guidance:g}, "
        f"Seed: {preview.seed}, Size: {width}x{height}, Training step: {step}",
    )
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def write_contact_sheet(config: Config, sizes: Sequence[Size]) -> Path:
    """Put all previews of a run side by side: a row for each prompt and size, a column for each step.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    from PIL import Image, ImageDraw

    folders = sorted(previews_folder(config).glob("step-*"))
    if len(folders) > _MOST_COLUMNS:
        last = len(folders) - 1
        folders = [folders[round(i * last / (_MOST_COLUMNS - 1))] for i in range(_MOST_COLUMNS)]
    names = [name for _, _, name in jobs(config, sizes)]
    gap, head = 4, 16
    page = Image.new("RGB", ((_CELL + gap) * len(folders), (_CELL + gap) * len(names) + head), "white")
    draw = ImageDraw.Draw(page)
    for column, folder in enumerate(folders):
        left = column * (_CELL + gap)
        draw.text((left + 2, 2), f"step {int(folder.name.removeprefix('step-'))}", fill="black")
        for row, name in enumerate(names):
            if (folder / name).is_file():
                with Image.open(folder / name) as image:
                    image.thumbnail((_CELL, _CELL))
                    page.paste(image, (left, head + row * (_CELL + gap)))
    path = previews_folder(config) / CONTACT_SHEET
    with atomic_path(path) as temporary:
        page.save(temporary, format="PNG")
    return path
