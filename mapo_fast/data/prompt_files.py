"""Files of prompts, as people and published prompt sets have them.

| file            | a prompt is                                                                            |
|-----------------|----------------------------------------------------------------------------------------|
| `.txt`          | a line                                                                                 |
| `.jsonl`        | `prompt` of the object in a line                                                       |
| `.csv`, `.tsv`  | the column `prompt`, `Prompt` (PartiPrompts) or `caption`                              |
| `.parquet`      | the same columns: `caption` (Pick-a-Pic), `Prompt` (PartiPrompts), `prompt` (HPD)      |
| `.json`         | a string of the list (HPD)                                                             |

Empty lines and cells are left out, and so is a prompt that was there before: images are known by their prompt
and seed. Of a parquet file, nothing but the column is read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.data.prompt_text import plain, remarks
from mapo_fast.models.sampling import LONGEST_TEXT
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import os_error, parse_json, read_bytes

COLUMNS = ("prompt", "Prompt", "caption")
_BYTES = 1 << 28
_ROWS = 4096

_Rows = Iterable[tuple[str, Any]]
"""Place of each value, for messages, and the value."""


class Prompts(NamedTuple):
    """The prompts of a file, each once, in its order."""

    texts: list[str]
    remarks: list[str]
    """Remarks for the user about the prompts."""


def read_prompts(path: Path) -> Prompts:
    """Read a file of prompts; see above.

    Raises:
        UserError: there is no such file, or it is damaged or of another kind, has no prompts, or has one that
            is no text or too long.
    """
    readers = {
        ".txt": _lines,
        ".jsonl": _objects,
        ".csv": _table,
        ".tsv": _table,
        ".parquet": _parquet,
        ".json": _list,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: prompts are read from {', '.join(readers)} files")
    texts: dict[str, None] = {}
    kinds, repeated = [], 0
    for where, value in _told(reader, path):
        text, found = _checked(value, f"{path}, {where}")
        if not text:
            continue
        kinds.append(found)
        repeated += text in texts
        texts[text] = None
    if not texts:
        raise UserError(f"{path} has no prompts")
    notes = list(remarks(kinds))
    if repeated:
        notes.append(f"{path} has {len(texts)} different prompts; {repeated} repeat one of them")
    return Prompts([*texts], notes)


def _told(reader: Any, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from reader(path)
    except OSError as error:
        raise os_error(error, f"read {path}") from None


def _checked(value: Any, where: str) -> tuple[str, frozenset[str]]:
    if value is None:
        return "", frozenset()
    if not isinstance(value, str):
        raise UserError(f"{where}: {shown(value)} is not text")
    if len(value) > LONGEST_TEXT:
        raise UserError(f"{where}: the prompt has {len(value):,} characters, more than {LONGEST_TEXT:,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the prompt is not valid Unicode") from None
    return plain(value)


def _text(path: Path) -> str:
    try:
        return read_bytes(path, _BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def _lines(path: Path) -> _Rows:
    for number, line in enumerate(_text(path).split("\n"), 1):
        yield f"line {number}", line


def _objects(path: Path) -> _Rows:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(value, dict) or "prompt" not in value:
            raise UserError(f'{path}, line {number} is no object with a "prompt"')
        yield f"line {number}", value["prompt"]


def _list(path: Path) -> _Rows:
    try:
        values = parse_json(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path} is not a list of texts")
    for number, value in enumerate(values, 1):
        yield f"entry {number}", value


def _table(path: Path) -> _Rows:
    file = io.StringIO(_text(path), newline="")
    if path.suffix.lower() == ".tsv":  # PartiPrompts has quotation marks in its texts that mean nothing
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(file, strict=True)
    try:
        head = next(rows, [])
        column = head.index(_column(head, path))
        for row in rows:
            if row and len(row) <= column:
                raise UserError(f"{path}, line {rows.line_num} has {len(row)} columns, fewer than its head")
            yield f"line {rows.line_num}", row[column] if row else ""
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num} cannot be read: {error}") from None


def _parquet(path: Path) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            name = _column(table.schema_arrow.names, path)
            number = 0
            for batch in table.iter_batches(_ROWS, columns=[name]):
                for value in batch.column(0):
                    number += 1
                    yield f"row {number}", value.as_py()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as parquet: {first}") from None


def _column(names: list[str], path: Path) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise UserError(f"{path} has no column {', '.join(COLUMNS)}: its columns are {shown(names)}")
