"""Base classes of sources of preference pairs, and of their rows.

A layout is a class of its own in a file of its own: it says whether a path is kept in it, opens the path and
reads its rows. `registry` knows all of them. `docs/extend/data_source.md` adds one.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from mapo_fast.util.errors import MachineError, UserError, printable
from mapo_fast.util.files import os_error, unreadable


@dataclass(frozen=True)
class PairRecord:
    """A pair as the source has it; or a single image, which is a pair without one of its halves."""

    index: int
    name: str
    """Place in the source, for people: `train-0.parquet:17`, `pairs.jsonl:3`, `chosen/a.png`."""
    prompt: str
    chosen: ImageReader | None
    """Reads the chosen image's file. None for a single unwanted image."""
    rejected: ImageReader | None
    """Reads the rejected image's file. None for a single wanted image."""
    label: float | None = None
    """Probability that the chosen image is the better one, where the source has it."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used, and why; reasons are fixed words, details are free text."""

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
        """Place of the image in its row or folder, for people."""

    def __call__(self) -> bytes:
        """The bytes of the image's file."""


class PreferencePairs(ABC):
    """A source of preference pairs, or of single labelled images.

    Rows are numbered 0 … len−1 in an order that does not change, and are read in ascending order. Nothing but
    the rows that are asked for is read, and not even the images of rows without a usable label.
    """

    looked_for: ClassVar[str]
    """The layout's mark, for the message where no layout is recognised: `pairs.jsonl`."""
    paired: bool = True
    """Whether the rows are pairs; otherwise they are single images."""
    note: str = ""
    """Note of `prepare` for the user about how the source is read."""
    where: Path
    """Path that the user named; `open_source` sets it."""
    to_confirm: str = ""
    """How images became pairs, where only a person can tell whether that is right; `prepare` asks."""
    default_caption: str = ""
    """The prompt of images that have none, `data.default_caption`; `open_source` sets it."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a path is kept in this layout.

        Names and kinds of files decide: no file is read, and neither torch nor numpy is imported.

        Args:
            path: a folder that can be listed, or a regular file.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> PreferencePairs:
        """The source at a path that `recognises` says yes to; no image is read.

        Raises:
            UserError: it cannot be used, with what to do.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, usable or not."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """The rows with these ascending numbers, each once.

        A row that cannot be used is a `SkippedRow`, and no reason to raise. An image's reader is valid until
        the next row is read.
        """

    def rows(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """`read`, with one line for errors of the file system; exceptions of the caller pass through."""
        with reading(self.where):
            yield from self.read(rows)

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """All files that the rows come from, in an order that does not change: see `identity`."""

    def identity(self) -> str:
        """Hash of the files' names, sizes and times: changes when the source may have changed.

        So does another default caption.
        """
        digest = hashlib.sha256(f"{type(self).__name__} {len(self)}".encode())
        if self.default_caption:
            digest.update(f"\n{self.default_caption}".encode())
        with reading(self.where):
            for file in self.files():
                digest.update(b"\n" + os.fsencode(os.path.realpath(file)))  # a name need not be valid UTF-8
                digest.update(_state(file).encode())
        return digest.hexdigest()


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Turn errors of the file system while reading `source` into one line.

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
    """Whether a path was rejected because it has a NUL or half of a surrogate pair."""
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
