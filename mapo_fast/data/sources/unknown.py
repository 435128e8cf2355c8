"""Describe a path in no known layout, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mapo_fast.data.sources.folders import IMAGE_SUFFIXES

PAIRS = (
    "a pair is two images for one prompt: chosen/NAME.png, rejected/NAME.png and the prompt in "
    'chosen/NAME.txt, or a line {"prompt": "…", "chosen": "a.png", "rejected": "b.png"} in pairs.jsonl'
)
SINGLE = (
    "single liked and disliked images train with --preset kto-lora, a line "
    '{"prompt": "…", "image": "a.png", "label": true} for each in pairs.jsonl'
)
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".zst", ".xz", ".bz2")
_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods", ".json", ".jsonl")
_TWINS = {"chosen": "rejected", "rejected": "chosen", "w": "l", "l": "w"}
_FOLDERS = 100
"""Most subfolders to look into."""


def what_it_is(path: Path, recognised: Callable[[Path], object]) -> str:
    """What the path holds instead of data in a known layout; empty where it is none of the usual mistakes.

    Args:
        path: a folder that can be listed, or a file.
        recognised: what says whether a folder is kept in a known layout.
    """
    if not path.is_dir():
        return _file(path)
    entries = sorted(path.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")][:_FOLDERS]
    files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    if not folders and not files:
        return f"is an empty folder: {PAIRS}"
    for folder in folders:
        if other := _TWINS.get(folder.name):
            return f"has {folder.name}/ and no {other}/: {PAIRS}; {SINGLE}"
    if nested := [folder for folder in folders if recognised(folder)]:
        return f"has the data in a folder of its own: name {nested[0]}"
    with_images = [folder for folder in folders if any(map(_is_image, folder.iterdir()))]
    if len(with_images) == 2:
        one, other = (folder.name for folder in with_images)
        return (
            f"has the folders {one}/ and {other}/, and nothing says which one people prefer: rename that "
            "one to chosen/ and the other one to rejected/"
        )
    if any(map(_is_image, files)) or with_images:
        tables = [file.name for file in files if file.suffix.lower() in _TABLES]
        beside = f", and {tables[0]} is not read" if tables else ""
        return f"has images and nothing that says which of two is preferred{beside}: {PAIRS}; {SINGLE}"
    return next((f"has {file.name} in it, which {said}" for file in files if (said := _file(file))), "")


def _file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _ARCHIVES:
        return "is an archive: unpack it, and name the folder"
    if suffix in _TABLES:
        return f"is a table that is not read: write its rows into a file named pairs.jsonl; {PAIRS}"
    return f"is one image: name the folder of the pairs; {PAIRS}" if _is_image(path) else ""


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and not path.is_dir()
