"""One source of preference pairs, or of single labelled images, for every layout people have them in.

`PreferencePairs.open(path)` recognises

- `pairs.jsonl` in a folder: one object per line with `prompt`, `chosen`, `rejected`; the two are paths
  relative to the folder that stay inside it (anything else is skipped and listed). It wins over the folders
  below, which may hold its images, and says so in `note`. A `label` is how probably the chosen image is the
  better one, 0 to 1. Or every line is a single image: `prompt`, `image`, and a `label` that says whether the
  image is wanted (true or 1) or not (false or 0);
- folders `chosen/` and `rejected/` (or `w/` and `l/`) with equal file names up to the suffix, subfolders
  included, and a caption `<name>.txt` next to the chosen or the rejected image;
- a Hugging Face dataset saved to disk, or a folder of arrow files;
- parquet: one file or a folder of them.

Links are followed (`listing`), and prompts and labels may have any type that spells them (`cells`).

The last two hold either Pick-a-Pic's columns (`jpg_0`, `jpg_1`, `label_0`, `label_1`, `caption`, `has_label`;
`label_0` = 1: `jpg_0` is chosen, 0: `jpg_1` is, 0.5: a tie, another share: the image with more is),
`prompt`, `chosen`, `rejected`, or, of single images, `prompt`, `image`, `label`. A source with several splits
is read as its `train` split, and says so in `note`. A cell of an image column is the file's bytes, a path
inside the folder, or a struct of `bytes` and `path`.

Rows are numbered 0 … len−1 in a fixed order and read in ascending order. Nothing but the rows asked for is
read, and of rows without a usable label not even the images.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mapo_fast.util.errors import MachineError, UserError, printable
from mapo_fast.util.files import check_regular, os_error, unreadable


@dataclass(frozen=True)
class PairRecord:
    """A pair as the source has it; or a single image, which is a pair without one of its halves."""

    index: int
    name: str
    """Where it stands in the source, for people: `train-0.parquet:17`, `pairs.jsonl:3`, `chosen/a.png`."""
    prompt: str
    chosen: ImageReader | None
    """Reads the chosen image's file. None beside a single unwanted image."""
    rejected: ImageReader | None
    """The rejected image's; None beside a single wanted image."""
    label: float | None = None
    """How probably the chosen image is the better one, where the source says so."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that is no usable pair, and why; reasons are few fixed words, details are not."""

    index: int
    name: str
    reason: str
    detail: str = ""


class MissingImageError(Exception):
    """An image that a getter cannot read; `str()` is the detail."""

    def __init__(self, detail: str, reason: str = "missing image") -> None:
        super().__init__(detail)
        self.reason = reason


class ImageReader(Protocol):
    """Reads one image's bytes, or raises `MissingImageError`."""

    @property
    def name(self) -> str:
        """Where it stands in its row or folder, for people."""

    def __call__(self) -> bytes:
        """The bytes of the image's file."""


class PreferencePairs(ABC):
    """A source of preference pairs; see the module's text. Make one with `PreferencePairs.open`."""

    paired: bool = True
    """Whether its rows are pairs; else single images."""
    note: str = ""
    where: Path
    """What `open` was given."""

    @staticmethod
    def open(source: Path) -> PreferencePairs:
        """Recognise the layout of `source`; no image is read.

        Raises:
            UserError: missing, unknown, ambiguous or unreadable layout.
        """
        with reading(source):
            pairs = PreferencePairs._recognise(source)
        pairs.where = source
        return pairs

    @staticmethod
    def _recognise(source: Path) -> PreferencePairs:
        from mapo_fast.data.sources import datasets as table_pairs
        from mapo_fast.data.sources import folders as twin_folders
        from mapo_fast.data.sources import jsonl as jsonl_pairs
        from mapo_fast.data.sources import parquet as parquet_pairs
        from mapo_fast.data.sources.listing import Entry, list_files

        if not os.path.lexists(source):
            raise UserError(f"data.source not found: {source}")
        if not source.is_dir():
            check_regular(source, source.stat().st_mode)
            if source.suffix.lower() == ".parquet":
                return parquet_pairs.ParquetPairs(
                    [Entry(source.name, Path(os.path.realpath(source)))], source.parent
                )
            if source.name == "pairs.jsonl":
                return jsonl_pairs.JsonlPairs(source.parent)
            raise _unknown(source)
        next(source.iterdir(), None)  # a folder without permission raises here, and looks empty below
        names = twin_folders.twin_folders(source)
        if os.path.lexists(table := source / "pairs.jsonl") and not table.is_dir():
            check_regular(table, table.stat().st_mode)
            pairs = jsonl_pairs.JsonlPairs(source)
            if names:
                pairs.note = (
                    f"{source} has pairs.jsonl and the folders {names[0]}/ + {names[1]}/: pairs.jsonl is used"
                )
            return pairs
        if names:
            return twin_folders.TwinFolderPairs(source, *names)
        if (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
            return table_pairs.open_saved_dataset(source)
        files = list_files(source)
        for suffix, opener in (
            (".parquet", parquet_pairs.ParquetPairs),
            (".arrow", table_pairs.open_arrow_files),
        ):
            if tables := table_pairs.tables(files, suffix):
                return table_pairs.open_split(tables, source, opener)
        raise _unknown(source)

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, usable or not."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """The rows with these ascending numbers; an image getter is valid until the next row is read."""

    def rows(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """`read`, with one line for what the file system refuses; what the caller does is not its matter."""
        with reading(self.where):
            yield from self.read(rows)

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """All files that the rows come from, in a fixed order."""

    def identity(self) -> str:
        """Hash of the files' names, sizes and times: changes when the source may have changed."""
        digest = hashlib.sha256(f"{type(self).__name__} {len(self)}".encode())
        with reading(self.where):
            for file in self.files():
                digest.update(b"\n" + os.fsencode(os.path.realpath(file)))  # a name need not be valid UTF-8
                digest.update(_state(file).encode())
        return digest.hexdigest()


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Turn what the file system refuses while reading `source` into one line.

    Raises:
        MachineError: I/O failed.
        UserError: the path, its kind or its permissions are wrong.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(f"data.source {source}", error) from error
    except ValueError as error:
        if not _no_path(error):
            raise
        raise UserError(f"data.source {printable(str(source))} is no path: {error}") from None


def _no_path(error: ValueError) -> bool:
    """Whether a path was refused: a NUL in it, or half of a surrogate pair."""
    return isinstance(error, UnicodeEncodeError) or "null" in str(error)


def _state(file: Path) -> str:
    """Size and time of a file; or that it cannot be read, so that a source changes when it appears."""
    try:
        info = file.stat()
    except OSError as error:
        if isinstance(os_error(error, ""), MachineError):
            raise
        return f" {error.errno}"
    return f" {info.st_size} {info.st_mtime_ns}"


def _unknown(source: Path) -> UserError:
    return UserError(
        f"data.source {source} has no layout that is known here; looked for pairs.jsonl, chosen/ + "
        "rejected/ folders, w/ + l/ folders, a Hugging Face dataset (state.json or *.arrow), *.parquet"
    )
