"""The folder that the user names: the files in it, and the one way from a path in it to an image's bytes.

The folder decides: links in it are followed, once, when it is listed or a path is looked up, to wherever they
lead. From then on the resolved file is used. Paths that a table names have to stay inside the folder as it is
listed. Only regular files are read, and none above `IMAGE_BYTES`.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from mapo_fast.data.sources.base import MissingImageError
from mapo_fast.util.errors import MachineError, shown
from mapo_fast.util.files import check_regular, os_error, read_bytes

IMAGE_BYTES = 1 << 29
"""Largest image file in bytes: 100 million pixels (`images.MAX_PIXELS`) of four bytes fit."""

LINKED_FOLDERS = 10_000
"""Most links to folders that a listing follows."""


@dataclass(frozen=True)
class Entry:
    """A file of a folder."""

    name: str
    """Path in the listing: relative to the folder, with `/`."""
    path: Path
    """The file itself, after links."""
    problem: str = ""
    """Why the file cannot be read, where it is not a regular file."""


def form(name: str) -> str:
    """A file name in Unicode's composed form, which is the same for names that look equal."""
    return unicodedata.normalize("NFC", name)


def list_files(folder: Path) -> list[Entry]:
    """All files below a folder in a fixed order, linked ones and those of linked folders too.

    A link to a folder that it lies in, a link to nothing, a device: each is an entry with its `problem`.

    Raises:
        OSError: a folder cannot be read, or there are more than `LINKED_FOLDERS` links to folders.
    """
    found: list[Entry] = []
    links = 0
    top = Path(os.path.realpath(folder))
    above: tuple[tuple[int, int], ...] = (_identity(top.stat()),)
    pending = [(top, "", above)]
    while pending:
        directory, prefix, above = pending.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_file(follow_symlinks=False):
                    found.append(Entry(name, Path(entry.path)))
                    continue
                path = Path(os.path.realpath(entry.path))
                try:
                    info = path.stat()
                except OSError as error:
                    if isinstance(os_error(error, ""), MachineError) or error.errno == errno.EACCES:
                        raise
                    found.append(Entry(name, path, f"{error.strerror} (a link to {path})"))
                    continue
                if not stat.S_ISDIR(info.st_mode):
                    found.append(Entry(name, path, _problem(path, info.st_mode)))
                elif _identity(info) in above or directory.is_relative_to(path):
                    found.append(Entry(name, path, f"it leads back to {path}, which it lies in"))
                else:
                    links += entry.is_symlink()
                    if links > LINKED_FOLDERS:
                        message = f"it has more than {LINKED_FOLDERS:,} links to folders"
                        raise OSError(errno.ELOOP, message, entry.path)
                    pending.append((path, name + "/", (*above, _identity(info))))
    return sorted(found, key=lambda entry: entry.name.split("/"))


def problems(entries: Sequence[Entry]) -> str:
    """One line that names skipped files; empty where there are none."""
    bad = [f"{entry.name}: {entry.problem}" for entry in entries if entry.problem]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"passed over: {'; '.join(bad[:3])}{more}" if bad else ""


class Folder:
    """The folder that the user named, for the paths that a table in it holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, dict[str, list[str]]] = {}

    def find(self, text: str) -> Path:
        """The regular file at a relative path, links followed.

        A name that is spelled in another Unicode form than on the disk is found too.

        Raises:
            MissingImageError: it leads outside the folder, does not exist or is no regular file.
        """
        inside = PurePath(os.path.normpath(text))
        if inside.anchor or inside.parts[:1] == (os.pardir,):
            raise MissingImageError(
                f"{shown(text)} must be a relative path inside the folder", "path outside the folder"
            )
        try:
            try:
                path = Path(os.path.realpath(self.root / inside, strict=True))
            except FileNotFoundError:
                path = Path(os.path.realpath(self._respelled(inside), strict=True))
            check_regular(path, path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or half of a surrogate pair
            if isinstance(error, OSError):
                _stop(error, self.root / inside)
            raise MissingImageError(f"{shown(text)}: {getattr(error, 'strerror', None) or error}") from None
        return path

    def _respelled(self, inside: PurePath) -> Path:
        """The path as the disk spells it."""
        at = self.root
        for part in inside.parts:
            if not os.path.lexists(at / part):
                alike = self._spellings(at).get(form(part), [])
                if len(alike) > 1:
                    names = " and ".join(ascii(name) for name in alike)
                    raise OSError(errno.ENOENT, f"{names} in {at} look equal: rename one")
                part = alike[0] if alike else part
            at = at / part
        return at

    def _spellings(self, directory: Path) -> dict[str, list[str]]:
        key = str(directory)
        if key not in self._names:
            names: dict[str, list[str]] = {}
            if directory.is_dir():
                for name in sorted(entry.name for entry in directory.iterdir()):
                    if not name.isascii():
                        names.setdefault(form(name), []).append(name)
            self._names[key] = names
        return self._names[key]


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own; call it for its bytes."""

    name: str
    """The image's path in its folder, for people."""
    path: Path

    def __call__(self) -> bytes:
        """The file's bytes.

        Raises:
            MissingImageError: there are none to read.
            MachineError: I/O failed.
        """
        try:
            return read_bytes(self.path, IMAGE_BYTES)
        except ValueError as error:
            raise MissingImageError(str(error)) from None
        except OSError as error:
            _stop(error, self.path)
            at = "" if self.path.as_posix().endswith(self.name) else f" ({self.path})"
            raise MissingImageError(f"{error.strerror or error}{at}") from None


def found_in(folder: Folder, texts: Iterable[str | None]) -> Iterator[Path]:
    """The files that a table's paths lead to, where there are any."""
    for text in texts:
        if text:
            try:
                yield folder.find(text)
            except MissingImageError:
                continue


def _stop(error: OSError, path: Path) -> None:
    """Raise where the machine failed: the rows after this one would fail as well, and the data is fine."""
    stopped = os_error(error, f"read {path}")
    if isinstance(stopped, MachineError):
        raise stopped from None


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _problem(path: Path, mode: int) -> str:
    try:
        check_regular(path, mode)
    except OSError as error:
        return str(error.strerror)
    return ""
