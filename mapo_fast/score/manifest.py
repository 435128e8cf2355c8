"""A folder of images of one model, with what each was made of: `images.jsonl`.

A line for each image: `file` (its name in the folder), `prompt`, `seed`, `settings` of the sampler, and
`sha256` of the file, which may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.data.images.formats import decoded_formats
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import (
    atomic_path,
    disk_errors,
    open_regular,
    os_error,
    parse_json,
    read_bytes,
    sha256_file,
)

MANIFEST = "images.jsonl"
_LARGEST = 2**28


class Made(NamedTuple):
    """An image and what it was made of."""

    path: Path
    prompt: str
    seed: int
    settings: Mapping[str, Any]
    sha256: str = ""
    """The file's, when it was made; empty where that is not known."""


def append(folder: Path, made: Made) -> None:
    """Add a line for an image that is written.

    Raises:
        UserError: the disk.
    """
    path = folder / MANIFEST
    with disk_errors(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(_line(made))


def _line(made: Made) -> str:
    line = {"file": made.path.name, **made._asdict(), "settings": dict(made.settings)}
    return json.dumps({name: line[name] for name in line if name != "path"}, ensure_ascii=False) + "\n"


def read(folder: Path) -> list[Made]:
    """The images of a folder, in the order of its manifest; a line that a kill cut short is left out.

    Raises:
        UserError: no manifest, a damaged line, an image that is missing or listed twice.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST}: make its images with mapo-fast sample")
    found = _listed(folder)
    if not found:
        raise UserError(f"{path} lists no image")
    for made in found:
        if not made.path.is_file():
            raise UserError(f"{path}: {made.path} is missing; run mapo-fast sample again")
    return found


def resume(folder: Path, settings: Mapping[str, Any]) -> list[Made]:
    """The images that a folder has, so that the others can be added to it.

    Of the manifest, what a kill cut short and lines of images that are missing or have changed are dropped.

    Raises:
        UserError: a damaged line, or images that were made with other settings; the disk.
    """
    path = folder / MANIFEST
    if not path.exists():
        return []
    found = _listed(folder)
    for made in found:
        for name in sorted(settings.keys() | made.settings.keys()):
            had, has = made.settings.get(name), settings.get(name)
            if had != has:
                raise UserError(
                    f"{path}: the images there have {name} = {shown(had)}, now it is {shown(has)}: name "
                    "another folder as --out, or repeat the command that made them"
                )
    there = [made for made in found if made.path.is_file() and _is_whole(made)]
    with disk_errors(path), atomic_path(path) as temporary:
        temporary.write_text("".join(map(_line, there)), encoding="utf-8", newline="\n")
    return there


def _is_whole(made: Made) -> bool:
    try:
        return made.sha256 in ("", sha256_file(made.path))
    except OSError as error:
        raise os_error(error, f"read {made.path}") from None


def _listed(folder: Path) -> list[Made]:
    """The images of a manifest, there or not."""
    path = folder / MANIFEST
    try:
        lines = read_bytes(path, _LARGEST).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise os_error(error, f"read {path}") from None
    found: dict[str, Made] = {}
    for number, line in enumerate(lines[:-1], 1):
        made = _parsed(line, folder, f"{path}, line {number}")
        if made.path.name in found:
            raise UserError(f"{path}, line {number}: {made.path.name} is listed twice")
        found[made.path.name] = made
    return [*found.values()]


def _parsed(line: str, folder: Path, where: str) -> Made:
    try:
        entry = parse_json(line)
        file, prompt, seed, settings = (entry[name] for name in ("file", "prompt", "seed", "settings"))
        if not (isinstance(file, str) and isinstance(prompt, str) and type(seed) is int):
            raise TypeError
        digest = entry.get("sha256", "")
        if not (isinstance(settings, dict) and isinstance(digest, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where} is damaged: delete the line, and run mapo-fast sample again") from None
    if Path(file).name != file or file in ("", ".", ".."):
        raise UserError(f"{where}: {file!r} is no name of a file in the folder")
    return Made(folder / file, prompt, seed, settings, digest)


def paired(folders: Sequence[Path]) -> list[list[Made]]:
    """The images of several folders, prompt by prompt and seed by seed.

    Returns:
        For each folder its images, all in the order of the first.

    Raises:
        UserError: a folder that cannot be read, or prompts, seeds or sizes that differ.
    """
    models = [read(folder) for folder in folders]
    wanted = [(made.prompt, made.seed) for made in models[0]]
    if len({*wanted}) < len(wanted):
        raise UserError(f"{folders[0] / MANIFEST} has a prompt twice with one seed: remove one of the lines")
    aligned = [models[0]]
    for folder, images in zip(folders[1:], models[1:], strict=True):
        by_key = {(made.prompt, made.seed): made for made in images}
        if len(by_key) < len(images):
            raise UserError(f"{folder / MANIFEST} has a prompt twice with one seed: remove one of the lines")
        missing = [key for key in wanted if key not in by_key] or [
            key for key in by_key if key not in {*wanted}
        ]
        if missing:
            prompt, seed = missing[0]
            raise UserError(
                f"{folders[0]} and {folder} have images of different prompts or seeds, such as "
                f"{prompt[:80]!r} at seed {seed}: sample both with the same --prompts and seeds"
            )
        aligned.append([by_key[key] for key in wanted])
        _check_sizes(aligned[0], aligned[-1])
    return aligned


def differences(models: Mapping[str, Sequence[Made]]) -> list[str]:
    """One remark for each setting, the model aside, of which a model's first image has another value."""
    (first, images), *others = models.items()
    wanted, found = images[0].settings, []
    for name, theirs in others:
        for key, value in theirs[0].settings.items():
            if key != "model" and key in wanted and wanted[key] != value:
                found.append(
                    f"{name} was sampled with {key} = {value!r}, {first} with {wanted[key]!r}: that is "
                    "compared too"
                )
    return found


def _check_sizes(ours: Sequence[Made], theirs: Sequence[Made]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        (width, height), (other_width, other_height) = _size(one), _size(other)
        if (width, height) != (other_width, other_height):
            raise UserError(
                f"{one.path} is {width} × {height} and {other.path} is {other_width} × {other_height}: "
                "sample both with the same --size"
            )


def _size(made: Made) -> tuple[int, int]:
    """Width and height of an image, from its header."""
    from PIL import Image

    try:
        with open_regular(made.path) as file, Image.open(file, formats=decoded_formats()) as image:
            return image.size
    except Exception as error:  # of damaged files almost anything
        raise UserError(f"{made.path} is no image ({type(error).__name__}): remove its line") from None
