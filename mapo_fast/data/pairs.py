"""One source of preference pairs, or of single labelled images, for every layout people have them in.

`PreferencePairs.open(path)` recognises

- `pairs.jsonl` in a folder: one object per line with `prompt`, `chosen`, `rejected`; the two are paths
  relative to the folder that stay inside it (anything else is skipped and listed). It wins over the folders
  below, which may hold its images, and says so in `note`. A `label` is how probably the chosen image is the
  better one, 0 to 1. Or every line is a single image: `prompt`, `image`, and a `label` that says whether the
  image is wanted (true or 1) or not (false or 0);
- folders `chosen/` and `rejected/` (or `w/` and `l/`) with equal file names up to the suffix, subfolders
  included, and a caption `<name>.txt` beside the chosen or the rejected image;
- a Hugging Face dataset saved to disk, or a folder of arrow files;
- parquet: one file or a folder of them.

The last two hold either Pick-a-Pic's columns (`jpg_0`, `jpg_1`, `label_0`, `label_1`, `caption`, `has_label`;
`label_0` = 1: `jpg_0` is chosen, 0: `jpg_1` is, 0.5: a tie, another share: the image with more is),
`prompt`, `chosen`, `rejected`, or, of single images, `prompt`, `image`, `label`. A source with several splits
is read as its `train` split, and says so in `note`.

Rows are numbered 0 … len−1 in a fixed order and read in ascending order. Nothing but the rows asked for is
read, and of rows without a usable label not even the images.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mapo_fast.errors import UserError


@dataclass(frozen=True)
class PairRecord:
    """A pair as the source has it; or a single image, which is a pair without one of its halves."""

    index: int
    name: str
    """Where it stands in the source, for people: `train-0.parquet:17`, `pairs.jsonl:3`, `chosen/a.png`."""
    prompt: str
    chosen: Callable[[], bytes] | None
    """Reads the chosen image's file. None beside a single unwanted image."""
    rejected: Callable[[], bytes] | None
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
    """An image file that a getter cannot read; `str()` is the detail."""


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
        from mapo_fast.data import folder_pairs, table_pairs

        if not source.exists():
            raise UserError(f"data.source not found: {source}")
        if source.is_file():
            if source.suffix == ".parquet":
                return table_pairs.ParquetPairs([source])
            if source.name == "pairs.jsonl":
                return folder_pairs.JsonlPairs(source.parent)
            raise _unknown(source)
        next(source.iterdir(), None)  # a folder without permission raises here, and looks empty below
        if (source / "pairs.jsonl").is_file():
            pairs = folder_pairs.JsonlPairs(source)
            if names := folder_pairs.twin_folders(source):
                pairs.note = (
                    f"{source} has pairs.jsonl and the folders {names[0]}/ + {names[1]}/: pairs.jsonl is used"
                )
            return pairs
        if names := folder_pairs.twin_folders(source):
            return folder_pairs.TwinFolderPairs(source, *names)
        if (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
            return table_pairs.open_saved_dataset(source)
        if files := sorted(source.rglob("*.parquet")):
            return table_pairs.open_split(files, source, table_pairs.ParquetPairs)
        if files := sorted(source.rglob("*.arrow")):
            return table_pairs.open_split(files, source, table_pairs.open_arrow_files)
        raise _unknown(source)

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, usable or not."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """The rows with these ascending numbers; an image getter is valid until the next row is read."""

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """All files that the rows come from, in a fixed order."""

    def identity(self) -> str:
        """Hash of the files' names, sizes and times: changes when the source may have changed."""
        digest = hashlib.sha256(f"{type(self).__name__} {len(self)}".encode())
        with reading(self.where):
            for file in self.files():
                stat = file.stat()
                digest.update(b"\n" + os.fsencode(file.resolve()))  # a name need not be valid UTF-8
                digest.update(f" {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Turn what the file system refuses while reading `source` into one `UserError`."""
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"data.source {source} cannot be read: {error.strerror or error}{at}; check its permissions and "
            "whether the disk is there"
        ) from error


def clean_prompt(index: int, name: str, prompt: object) -> str | SkippedRow:
    """The prompt without surrounding white space, or why the row cannot be used."""
    if prompt is None or not isinstance(prompt, str):
        return SkippedRow(index, name, "missing caption")
    stripped = prompt.strip()
    try:
        stripped.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        return SkippedRow(index, name, "bad caption", f"not valid Unicode: {error.reason} in {stripped!r}")
    return stripped if stripped else SkippedRow(index, name, "empty caption")


def soft_label(index: int, name: str, label: object) -> float | SkippedRow:
    """A label in [0, 1], or why the row cannot be used."""
    if isinstance(label, (int, float)) and not isinstance(label, bool) and 0 <= label <= 1:
        return float(label)
    return SkippedRow(index, name, "bad label", f"label = {label!r} is no number from 0 to 1")


def wanted(index: int, name: str, label: object) -> bool | SkippedRow:
    """Whether a single image is wanted, or why the row cannot be used."""
    if label is None:
        return SkippedRow(index, name, "no label")
    if isinstance(label, (bool, int, float)) and label in (0, 1):
        return bool(label)
    return SkippedRow(index, name, "bad label", f"label = {label!r} is neither true or 1 nor false or 0")


def _unknown(source: Path) -> UserError:
    return UserError(
        f"data.source {source} has no layout that is known here; looked for pairs.jsonl, chosen/ + "
        "rejected/ folders, w/ + l/ folders, a Hugging Face dataset (state.json or *.arrow), *.parquet"
    )
