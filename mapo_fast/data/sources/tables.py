"""Shared code for tables, parquet files and Hugging Face datasets: columns, cells, files of one split.

The columns are Pick-a-Pic's (`jpg_0`, `jpg_1`, `label_0`, `label_1`, `caption`, `has_label`; `label_0` = 1:
`jpg_0` is chosen, 0: `jpg_1` is, 0.5: a tie, another share: the image with more is), or `prompt`, `chosen`,
`rejected`, or, of single images, `prompt`, `image`, `label`.

An image column may hold a file's bytes, a path inside the folder, or a Hugging Face `Image` feature (a struct
of bytes and path). Cells are read from Arrow one by one: a value that Python cannot hold costs its row only.

pyarrow, which imports numpy, is imported where a cell is read: that a layout is recognised takes neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, SkippedRow
from mapo_fast.data.sources.cells import clean_prompt, is_missing, number, wanted
from mapo_fast.data.sources.listing import IMAGE_BYTES, Entry, Folder, ImageFile, problems
from mapo_fast.util.errors import UserError, printable, shown

if TYPE_CHECKING:
    import pyarrow as pa

_ROUNDED = 1e-3
"""How far two labels may be from 1 together: half-precision floats and three digits are rounded."""


class Verdict(NamedTuple):
    """A row's contents: its prompt, the columns of its two images, and how sure the preference is."""

    prompt: str
    chosen: str | None
    rejected: str | None
    label: float | None


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and how to read a row of them."""

    images: tuple[str, ...]
    small: tuple[str, ...]
    kind: Literal["ranked", "named", "single"]
    """Pick-a-Pic's columns, where labels say which image is chosen; chosen and rejected; or one image."""

    def judge(self, index: int, name: str, row: dict[str, Any], default: str) -> Verdict | SkippedRow:
        """A row's contents, or why it cannot be used; a row without a prompt gets the `default`."""
        if self.kind == "single":
            good = wanted(index, name, row["label"])
            prompt = clean_prompt(index, name, row["prompt"], default=default)
            for skipped in (good, prompt):
                if isinstance(skipped, SkippedRow):
                    return skipped
            chosen, rejected = ("image", None) if good else (None, "image")
            return Verdict(str(prompt), chosen, rejected, None)
        first, second = self.images
        if self.kind == "named":
            prompt = clean_prompt(index, name, row["prompt"], default=default)
            return prompt if isinstance(prompt, SkippedRow) else Verdict(prompt, first, second, None)
        cells = row["label_0"], row["label_1"]
        found = f"label_0 = {shown(cells[0])}, label_1 = {shown(cells[1])}"
        has_label = row.get("has_label")
        if number(has_label) == 0 or any(map(is_missing, cells)):
            return SkippedRow(index, name, "no label", f"{found}, has_label = {shown(has_label)}")
        if number(has_label) != 1 and not is_missing(has_label):
            return SkippedRow(
                index, name, "bad label", f"has_label = {shown(has_label)} is neither true nor false"
            )
        best, worst = (number(cell) for cell in cells)
        if best is None or worst is None or not (0 <= best <= 1 and abs(best + worst - 1) < _ROUNDED):
            return SkippedRow(index, name, "bad label", f"{found}: needed are numbers that add up to 1")
        if best == worst:
            return SkippedRow(index, name, "tie", found)
        prompt = clean_prompt(index, name, row["caption"], "caption", default=default)
        if isinstance(prompt, SkippedRow):
            return prompt
        if best < worst:
            first, second, best = second, first, worst
        return Verdict(prompt, first, second, best)


def columns_of(names: Sequence[str], where: Path) -> Columns:
    """Recognise a table by its column names.

    Raises:
        UserError: naming what was looked for, or a column that is there twice.
    """
    have = set(names)
    if {"jpg_0", "jpg_1", "label_0", "label_1", "caption"} <= have:
        small = ("label_0", "label_1", "caption", *(("has_label",) if "has_label" in have else ()))
        columns = Columns(("jpg_0", "jpg_1"), small, "ranked")
    elif {"prompt", "chosen", "rejected"} <= have:
        columns = Columns(("chosen", "rejected"), ("prompt",), "named")
    elif {"prompt", "image", "label"} <= have:
        columns = Columns(("image",), ("prompt", "label"), "single")
    else:
        raise UserError(
            f"{where} has the columns {listed(have)}; needed are jpg_0, jpg_1, label_0, label_1, "
            "caption (Pick-a-Pic), or prompt, chosen, rejected, or prompt, image, label (single images)"
        )
    twice = [name for name in (*columns.images, *columns.small) if names.count(name) > 1]
    if twice:
        raise UserError(f"{where} has more than one column {twice[0]}: remove or rename one")
    return columns


def listed(names: Iterable[str]) -> str:
    """Names from outside, in order, for a message."""
    names = sorted(printable(name) for name in names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


@dataclass(frozen=True)
class Unreadable:
    """A cell whose value Python cannot hold, such as a date in the year 300,000."""

    type: str


def cell(scalar: Any) -> Any:
    """The Python value of an Arrow scalar."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
    except Exception:  # out of range, an unknown time zone, a library that is not installed
        return Unreadable(str(scalar.type))


@dataclass(frozen=True)
class ImageCell:
    """A cell of an image column; call it for the image's bytes."""

    name: str
    """The column."""
    scalar: Any
    folder: Folder

    def __call__(self) -> bytes:
        """The file's bytes.

        Raises:
            MissingImageError: there are none to read.
            MachineError: I/O failed.
        """
        needed = "needed are a file's bytes, a path, or a struct of bytes and path"
        if not _holds_image(self.scalar.type):
            raise MissingImageError(f"the column has the type {printable(str(self.scalar.type))}: {needed}")
        value = cell(self.scalar)
        if isinstance(value, dict):
            found = value.get("bytes")
            value = value.get("path") if found is None else found
        if value is None:
            raise MissingImageError("no bytes in the image column")
        if isinstance(value, str):
            return ImageFile(value, self.folder.find(value))()
        if not isinstance(value, bytes):
            raise MissingImageError(f"{shown(value)}: {needed}")
        if len(value) > IMAGE_BYTES:
            raise MissingImageError(f"it is larger than the limit of {IMAGE_BYTES:,} bytes")
        return value


def _holds_image(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = _values(kind)
    if pa.types.is_struct(kind):
        return {"bytes", "path"} & {field.name for field in kind} != set()
    return is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view") or str(kind).startswith("fixed_size_binary")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, in a dictionary or not."""
    return str(_values(kind)) in ("string", "large_string", "string_view")


def _values(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: a dictionary (pandas' category) is a way to store them."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def record(
    index: int, name: str, verdict: Verdict, row: pa.Table | pa.RecordBatch, folder: Folder
) -> PairRecord:
    """The pair that a row of image cells holds."""
    chosen, rejected = (
        None if column is None else ImageCell(column, row.column(column)[0], folder)
        for column in (verdict.chosen, verdict.rejected)
    )
    return PairRecord(index, name, verdict.prompt, chosen, rejected, verdict.label)


def has_tables(files: Iterable[Entry], suffix: str) -> bool:
    """Whether there is a table among a folder's files, readable or not."""
    return any(map(_is_table(suffix), files))


def tables(files: Iterable[Entry], suffix: str) -> list[Entry]:
    """The tables among a folder's files.

    Raises:
        UserError: one of them cannot be read.
    """
    found = list(filter(_is_table(suffix), files))
    if problem := problems(found):
        raise UserError(f"data.source cannot be read whole ({problem.removeprefix('passed over: ')})")
    return found


def _is_table(suffix: str) -> Callable[[Entry], bool]:
    """Files with this suffix that are not hidden."""

    def is_table(file: Entry) -> bool:
        name = PurePosixPath(file.name)
        return name.suffix.lower() == suffix and not name.name.startswith(".")

    return is_table


_Pairs = TypeVar("_Pairs", bound=PreferencePairs)


def open_split(files: list[Entry], source: Path, opener: Callable[[list[Entry], Path], _Pairs]) -> _Pairs:
    """Open the files of one split: all of them, or `train` where their names or folders tell splits apart."""
    splits: dict[str, list[Entry]] = {}
    for file in files:
        splits.setdefault(_split(PurePosixPath(file.name)), []).append(file)
    if len(splits) == 1:
        return opener(files, source)
    if "train" not in splits:
        mixed = listed(f"{name}-*" if name else "files of no split" for name in splits)
        raise UserError(
            f"data.source {source} mixes {mixed}: move one split to its own folder and name that folder"
        )
    pairs = opener(splits["train"], source)
    found = listed(name or "(files of no split)" for name in splits)
    used = f"{source} has the splits {found}; train is used"
    pairs.note = f"{used}; {pairs.note}" if pairs.note else used
    return pairs


_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def _split(file: PurePosixPath) -> str:
    """The split of a file: `train-00000-of-00002.parquet`, `train.parquet`, `train/0.parquet`."""
    if match := re.match(r"(.+?)-\d+-of-\d+", file.name):
        return match[1]
    return next((name for name in (file.stem, *reversed(file.parts[:-1])) if name.lower() in _SPLITS), "")


def paths_of(column: pa.Array) -> Iterator[str | None]:
    """The paths in an image column where it holds no bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        names = {field.name for field in column.type}
        if "path" not in names:
            return
        if "bytes" in names:
            column = column.filter(pc.is_null(pc.struct_field(column, "bytes")))
        column = pc.struct_field(column, "path")
    if is_text(column.type):
        for scalar in column:
            value = cell(scalar)
            yield value if isinstance(value, str) else None


def first_line(error: Exception) -> str:
    """The message of another library's error, on one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
