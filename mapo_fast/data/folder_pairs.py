"""Preference pairs from plain folders: `pairs.jsonl`, and `chosen/` + `rejected/` twins."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mapo_fast.data.pairs import (
    MissingImageError,
    PairRecord,
    PreferencePairs,
    SkippedRow,
    clean_prompt,
    soft_label,
    wanted,
)
from mapo_fast.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
)


def read_image_file(path: Path) -> bytes:
    """The file's bytes. Raises `MissingImageError` where there are none to read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingImageError(f"{path}: {error.strerror or error}") from None


class JsonlPairs(PreferencePairs):
    """A folder with `pairs.jsonl`. Empty lines are no rows. All are pairs, or all are single images."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.table = folder, folder / "pairs.jsonl"
        self._root = folder.resolve()
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        with self.table.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
            file.seek(0)
            kinds = (kind for line in file if (kind := _pairs(_parsed(line))) is not None)
            self.paired = next(kinds, True)

    def __len__(self) -> int:
        """Lines that are not empty."""
        return len(self._offsets)

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        with self.table.open("rb") as file:
            for index in rows:
                file.seek(self._offsets[index])
                yield self._row(index, file.readline())

    def files(self) -> Iterable[Path]:
        """The table and every image that it names."""
        yield self.table
        for row in self.read(range(len(self))):
            if isinstance(row, PairRecord):
                yield from (read.args[0] for read in (row.chosen, row.rejected) if isinstance(read, partial))

    def _row(self, index: int, line: bytes) -> PairRecord | SkippedRow:
        name = f"pairs.jsonl:{self._lines[index]}"
        row = _parsed(line)
        if isinstance(row, Exception):
            return SkippedRow(index, name, "bad line", f"not JSON: {row}")
        if _pairs(row) is (not self.paired):
            raise UserError(
                f"data.source {self.table} mixes pairs (prompt, chosen, rejected) and single images (prompt, "
                f"image, label): line {self._lines[index]} is not what the first one is; make two sources"
            )
        keys = ("chosen", "rejected") if self.paired else ("image",)
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            return SkippedRow(
                index, name, "bad line", f"needs the keys prompt, {', '.join(keys)} with text values"
            )
        prompt = clean_prompt(index, name, row.get("prompt"))
        if isinstance(prompt, SkippedRow):
            return prompt
        label: float | bool | SkippedRow | None = row.get("label")
        if not self.paired:
            label = wanted(index, name, label)
        elif label is not None:
            label = soft_label(index, name, label)
        if isinstance(label, SkippedRow):
            return label
        paths = []
        for key in keys:
            try:
                path = (self._root / row[key]).resolve()
                found = path.is_file()
            except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a loop of links
                detail = f"{key} = {row[key]!r}: {getattr(error, 'strerror', None) or error}"
                return SkippedRow(index, name, "missing image", detail)
            if Path(row[key]).is_absolute() or not path.is_relative_to(self._root):
                detail = f"{key} = {row[key]!r} must be a relative path inside the folder"
                return SkippedRow(index, name, "path outside the folder", detail)
            if not found:
                return SkippedRow(index, name, "missing image", f"{key} = {row[key]!r} is not a file")
            paths.append(path)
        if not self.paired:
            image = partial(read_image_file, paths[0])
            return PairRecord(index, name, prompt, *((image, None) if label else (None, image)))
        chosen, rejected = (partial(read_image_file, path) for path in paths)
        return PairRecord(index, name, prompt, chosen, rejected, label)


def _parsed(line: bytes) -> Any:
    """What a line of JSON says, or the error."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error


def _pairs(row: Any) -> bool | None:
    """Whether a line is a pair or a single image; None where it is neither."""
    if not isinstance(row, dict) or not {"chosen", "rejected", "image"} & row.keys():
        return None
    return bool({"chosen", "rejected"} & row.keys())


def twin_folders(folder: Path) -> tuple[str, str] | None:
    """The names of the two twin folders in `folder`, or None where there are none."""
    for names in (("chosen", "rejected"), ("w", "l")):
        if all((folder / name).is_dir() for name in names):
            return names
    return None


class TwinFolderPairs(PreferencePairs):
    """`chosen/` and `rejected/` (or `w/` and `l/`) with equal names, and `.txt` captions in either."""

    def __init__(self, folder: Path, chosen: str, rejected: str) -> None:
        self.folder, self.names = folder, (chosen, rejected)
        self._images = [_images_by_stem(folder / name) for name in self.names]
        self._stems = sorted(set(self._images[0]) | set(self._images[1]))
        if not self._stems:
            raise UserError(f"data.source {folder}: {chosen}/ and {rejected}/ hold no images")

    def __len__(self) -> int:
        """Distinct file names, suffixes aside."""
        return len(self._stems)

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        for index in rows:
            yield self._row(index)

    def files(self) -> Iterable[Path]:
        """Images and captions."""
        for stem in self._stems:
            for name, images in zip(self.names, self._images, strict=True):
                yield from images.get(stem, ())
                caption = self.folder / name / f"{stem}.txt"
                if caption.is_file():
                    yield caption

    def _row(self, index: int) -> PairRecord | SkippedRow:
        stem = self._stems[index]
        name = f"{self.names[0]}/{stem}"
        found = [images.get(stem, []) for images in self._images]
        for side, files in zip(self.names, found, strict=True):
            if not files:
                return SkippedRow(index, name, "missing counterpart", f"no image {stem}.* in {side}/")
            if len(files) > 1:
                detail = f"{side}/ has " + ", ".join(file.name for file in files)
                return SkippedRow(index, name, "ambiguous name", detail)
        text: str | None = None
        for side in self.names:
            caption = self.folder / side / f"{stem}.txt"
            if caption.is_file():
                try:
                    text = caption.read_text(encoding="utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    return SkippedRow(index, name, "unreadable caption", f"{caption}: {error}")
                break
        prompt = clean_prompt(index, name, text)
        if isinstance(prompt, SkippedRow):
            return prompt
        chosen, rejected = (partial(read_image_file, files[0]) for files in found)
        return PairRecord(index, name, prompt, chosen, rejected)


def _refuse(error: OSError) -> None:
    """`os.walk` would pass over a folder that it cannot read."""
    raise error


def _images_by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for directory, _, names in os.walk(folder, onerror=_refuse):
        for name in sorted(names):
            path = Path(directory, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return found
