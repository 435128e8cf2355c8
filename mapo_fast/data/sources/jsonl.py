"""Preference pairs, or single images, from a folder with `pairs.jsonl`.

One object per line with `prompt`, `chosen`, `rejected`; the two are paths relative to the folder that stay
inside it (anything else is skipped and listed). A `label` is how probably the chosen image is the better one,
0 to 1. Or every line is a single image: `prompt`, `image`, and a `label` that says whether the image is
wanted (true or 1) or not (false or 0).
"""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, SkippedRow
from mapo_fast.data.sources.cells import clean_prompt, soft_label, wanted
from mapo_fast.data.sources.folders import twin_folders
from mapo_fast.data.sources.listing import Folder, ImageFile
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import check_regular, parse_json

LINE_BYTES = 1 << 20
"""Bytes of the longest line; longer ones are skipped and listed."""


class JsonlPairs(PreferencePairs):
    """A folder with `pairs.jsonl`. Empty lines are no rows. All are pairs, or all are single images.

    It wins over twin folders next to it, which may hold its images.
    """

    looked_for = "pairs.jsonl"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """The table itself, or a folder that holds it."""
        table = path / "pairs.jsonl"
        return path.name == "pairs.jsonl" if path.is_file() else os.path.lexists(table) and not table.is_dir()

    @classmethod
    def open(cls, path: Path) -> JsonlPairs:
        """See `PreferencePairs.open`."""
        if path.is_file():
            return cls(path.parent)
        table = path / "pairs.jsonl"
        check_regular(table, table.stat().st_mode)
        pairs = cls(path)
        if names := twin_folders(path):
            pairs.note = (
                f"{path} has pairs.jsonl and the folders {names[0]}/ + {names[1]}/: pairs.jsonl is used"
            )
        return pairs

    def __init__(self, folder: Path) -> None:
        self.folder, self.table = Folder(folder), folder / "pairs.jsonl"
        self._offsets, self._lines = array("q"), array("q")
        self.paired, known = True, False
        with self.table.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"data.source {self.table} is UTF-16: save it as UTF-8")
            file.seek(0)
            for number, (offset, line) in enumerate(_lines(file), start=1):
                if not line.strip():
                    continue
                self._offsets.append(offset)
                self._lines.append(number)
                if not known and (kind := _pairs(_parsed(line))) is not None:
                    self.paired, known = kind, True

    def __len__(self) -> int:
        """Number of lines that are not empty."""
        return len(self._offsets)

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        with self.table.open("rb") as file:
            for index in rows:
                file.seek(self._offsets[index])
                yield self._row(index, file.readline(LINE_BYTES))

    def files(self) -> Iterable[Path]:
        """The table and every image that it names, also where there is none."""
        yield self.table
        with self.table.open("rb") as file:
            for _, line in _lines(file):
                row = _parsed(line)
                for key in self._keys if isinstance(row, dict) else ():
                    if isinstance(row.get(key), str):
                        try:
                            yield self.folder.find(row[key])
                        except MissingImageError as error:
                            if error.reason == "missing image" and "\0" not in row[key]:
                                yield self.folder.root / row[key].encode("utf-8", "replace").decode()

    @property
    def _keys(self) -> tuple[str, ...]:
        return ("chosen", "rejected") if self.paired else ("image",)

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
        if not isinstance(row, dict):
            return SkippedRow(index, name, "bad line", f"needed is an object, not {shown(row)}")
        for key in self._keys:
            if not isinstance(row.get(key), str):
                needs = f"needs the keys prompt, {', '.join(self._keys)} with text values"
                found = f"{key} = {shown(row[key])}" if key in row else f"{key} is missing"
                return SkippedRow(index, name, "bad line", f"{needs}: {found}")
        prompt = clean_prompt(index, name, row.get("prompt"), default=self.default_caption)
        if isinstance(prompt, SkippedRow):
            return prompt
        label: float | bool | SkippedRow | None = row.get("label")
        if not self.paired:
            label = wanted(index, name, label)
        elif label is not None:
            label = soft_label(index, name, label)
        if isinstance(label, SkippedRow):
            return label
        images = []
        for key in self._keys:
            try:
                images.append(ImageFile(row[key], self.folder.find(row[key])))
            except MissingImageError as error:
                return SkippedRow(index, name, error.reason, f"{key} = {error}")
        if self.paired:
            return PairRecord(index, name, prompt, images[0], images[1], label)
        chosen, rejected = (images[0], None) if label else (None, images[0])
        return PairRecord(index, name, prompt, chosen, rejected)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and first `LINE_BYTES` bytes of every line."""
    offset = 0
    while line := file.readline(LINE_BYTES):
        yield offset, line
        offset += len(line)
        while len(line) == LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)
            offset += len(line)


def _parsed(line: bytes) -> Any:
    """The object in a line of JSON, or the error."""
    if len(line) == LINE_BYTES:
        return ValueError(f"the line has {LINE_BYTES:,} bytes or more")
    try:
        return parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        return error


def _pairs(row: Any) -> bool | None:
    """Whether a line is a pair or a single image; None where it is neither."""
    if not isinstance(row, dict) or not {"chosen", "rejected", "image"} & row.keys():
        return None
    return bool({"chosen", "rejected"} & row.keys())
