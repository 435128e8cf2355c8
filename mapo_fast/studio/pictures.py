"""The pictures of a project: found in the background, listed by prompt.

A scan reads headers and texts only, in one pass that can be stopped at any time; what is found is listed
while it goes on. Files that have not changed are not read again. Links are listed as broken: a project from
elsewhere could point anywhere with them.

A prompt comes from what was typed, else from the picture's own metadata, else from a `.txt` or `.caption`
file beside it. Where metadata has several candidates and there is no such file, the prompt is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.data.images.header import header
from mapo_fast.data.picture_origin import Origin, origin
from mapo_fast.studio.index import Index
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.files import read_bytes, sha256_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NEVER = (
    ".avif", ".bmp", ".eps", ".gif", ".heic", ".html", ".jxl", ".ps", ".svg", ".tif", ".tiff",
)  # fmt: skip
"""Listed with the reason why they cannot be shown."""
SIDECARS = (".txt", ".caption")
PROMPT_BYTES = 1 << 16
"""Longest prompt, in bytes."""
_BATCH = 200
_LORA = re.compile(r"\s*<lora:[^>]{1,200}>")


class Picture(NamedTuple):
    """A picture of the index; texts are empty where they are not known."""

    id: int
    path: str
    """From the project's folder, with `/`; absolute where it is elsewhere."""
    bytes: int
    width: int
    height: int
    prompt: str | None
    why: str
    """Why there is no prompt."""
    broken: str
    """Why it cannot be shown."""
    model: str
    sampler: str
    lora: str
    seed: str
    of: int | None
    """The picture whose file is the same, byte by byte."""


_COLUMNS = ", ".join(Picture._fields)


class Group(NamedTuple):
    """Pictures of one prompt."""

    id: int
    """The id of the group's first picture."""
    prompt: str
    size: int
    """Number of different pictures."""
    first: int
    """Its first picture."""


class Progress(NamedTuple):
    """How far a scan is."""

    seen: int
    new: int
    broken: int
    done: bool


class Pictures:
    """Reads and fills the index."""

    def __init__(self, project: Path, index: Index, typed: Callable[[], Mapping[str, str]]) -> None:
        self._project, self._index, self._typed = project, index, typed
        self.version = 0
        """Rises with every change."""

    def scan(
        self, folders: Iterable[Path], left_out: Collection[Path], stop: Callable[[], bool]
    ) -> Iterator[Progress]:
        """Bring the index up to date with all below `folders` but `left_out`.

        Raises:
            UserError: a folder cannot be read.
        """
        known = {path: (size, changed) for path, size, changed in self._known()}
        typed = self._typed()
        seen = new = broken = 0
        batch: list[tuple[Any, ...]] = []
        for file in _files(folders, left_out):
            if stop():
                break
            seen += 1
            name = self.name_of(file)
            try:
                facts = os.lstat(file)
            except OSError:
                continue  # it has gone since the folder was listed
            stamp = facts.st_size, facts.st_mtime_ns ^ _sidecar_stamp(file)
            if known.pop(name, None) != stamp:
                row = _looked_at(file, name, stamp, typed.get(name))
                new, broken = new + 1, broken + bool(row[8])
                batch.append(row)
            if len(batch) == _BATCH or (batch and seen % 2000 == 0):
                self._put(batch)
                batch = []
                yield Progress(seen, new, broken, done=False)
        else:
            self._index.write("delete from pictures where path = ?", ((name,) for name in known))
            self.version += bool(known)
        self._put(batch)
        self._find_duplicates()
        yield Progress(seen, new, broken, done=True)

    def _known(self) -> list[tuple[Any, ...]]:
        return self._index.rows("select path, bytes, changed from pictures")

    def _put(self, batch: list[tuple[Any, ...]]) -> None:
        if not batch:
            return
        marks = ", ".join("?" * 13)
        self._index.write(
            "insert into pictures(path, bytes, changed, format, width, height, prompt, why, broken, model, "
            f"sampler, lora, seed) values ({marks}) on conflict(path) do update set bytes = excluded.bytes, "
            "changed = excluded.changed, format = excluded.format, width = excluded.width, "
            "height = excluded.height, prompt = excluded.prompt, why = excluded.why, "
            "broken = excluded.broken, model = excluded.model, sampler = excluded.sampler, "
            "lora = excluded.lora, seed = excluded.seed, "
            "digest = null, of = null, look = null, colour = null",
            batch,
        )
        self.version += 1

    def _find_duplicates(self) -> None:
        """Files of one size are compared by their SHA-256; the first one stays, the others point to it."""
        same = self._index.rows(
            "select id, path from pictures where digest is null and broken = '' and bytes in "
            "(select bytes from pictures where broken = '' group by bytes having count(*) > 1)"
        )
        for start in range(0, len(same), _BATCH):
            found = [(_digest(self.file_of(path)), id) for id, path in same[start : start + _BATCH]]
            self._index.write("update pictures set digest = ? where id = ?", found)
        self._index.write(
            "update pictures set of = (select min(id) from pictures as p where p.digest = pictures.digest "
            "and p.broken = '') where digest is not null",
            [()],
        )
        self._index.write("update pictures set of = null where of = id", [()])
        self.version += bool(same)

    def digest(self, id: int) -> str:
        """SHA-256 of a picture's file.

        Raises:
            UserError: it cannot be read.
        """
        ((path, digest),) = self._index.rows("select path, digest from pictures where id = ?", [id])
        if not digest:
            digest = _digest(self.file_of(path))
            if digest is None:
                raise UserError(f"{path} cannot be read any more: scan the folder again")
            self._index.write("update pictures set digest = ? where id = ?", [(digest, id)])
        return str(digest)

    def get(self, id: int) -> Picture | None:
        """A picture by its number."""
        found = self._index.rows(f"select {_COLUMNS} from pictures where id = ?", [id])
        return Picture(*found[0]) if found else None

    def some(self, where: str, values: list[object], limit: int) -> list[Picture]:
        """Pictures by their numbers, ascending; `where` is SQL of this program."""
        rows = self._index.rows(
            f"select {_COLUMNS} from pictures where {where} order by id limit ?", [*values, limit]
        )
        return [Picture(*row) for row in rows]

    def groups(self) -> list[Group]:
        """Prompts with their numbers of different pictures, in the order of their first pictures."""
        rows = self._index.rows(
            "select min(id), prompt, sum(of is null), min(id) from pictures "
            "where broken = '' and prompt is not null group by prompt order by min(id)"
        )
        return [Group(*row) for row in rows]

    def members(self) -> dict[str, list[int]]:
        """Different pictures of each prompt."""
        found: dict[str, list[int]] = {}
        for prompt, id in self._index.rows(
            "select prompt, id from pictures where broken = '' and prompt is not null and of is null "
            "order by id"
        ):
            found.setdefault(prompt, []).append(id)
        return found

    def set_prompt(self, ids: Iterable[int], prompt: str) -> None:
        """Give pictures a typed prompt."""
        self._index.write(
            "update pictures set prompt = ?, why = '' where id = ?", ((prompt, id) for id in ids)
        )
        self.version += 1

    def name_of(self, file: Path) -> str:
        """A file's path as the index has it."""
        inside = file.is_relative_to(self._project)
        path = (file.relative_to(self._project) if inside else file).as_posix()
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def file_of(self, name: str) -> Path:
        """The file of a path of the index."""
        return self._project / name


def _files(folders: Iterable[Path], left_out: Collection[Path]) -> Iterator[Path]:
    """Files with a picture's suffix below the folders; links to folders and hidden folders are left out."""
    left = list(dict.fromkeys(folders))[::-1]
    done: set[Path] = set()
    while left:
        folder = left.pop()
        if folder in done or folder in left_out:
            continue
        done.add(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from None
        deeper = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                deeper.append(folder / entry.name)
            elif Path(entry.name).suffix.lower() in (*SUFFIXES, *NEVER):
                yield folder / entry.name
        left += deeper[::-1]


def _sidecars(file: Path) -> Iterator[Path]:
    for suffix in SIDECARS:
        if not (path := file.with_suffix(suffix)).is_symlink():
            yield path


def _sidecar_stamp(file: Path) -> int:
    """Changes when a text beside the picture does."""
    for path in _sidecars(file):
        try:
            return os.lstat(path).st_mtime_ns + 1
        except OSError:
            continue
    return 0


def _looked_at(file: Path, name: str, stamp: tuple[int, int], typed: str | None) -> tuple[Any, ...]:
    """A row of the index."""
    try:
        if file.is_symlink():
            raise ValueError("it is a link: copy the picture itself into the folder")
        if file.suffix.lower() in NEVER:
            raise ValueError("it is no PNG, JPEG or WebP picture: convert it")
        found = header(file)
        made = origin(file)
    except (OSError, ValueError, MachineError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return (name, *stamp, "", 0, 0, None, "", why, "", "", "", "")
    prompt, why = _prompt(file, made, typed)
    rest = made.model, made.sampler, made.lora, made.seed
    return (name, *stamp, found.format, found.width, found.height, prompt, why, "", *rest)


def _prompt(file: Path, made: Origin, typed: str | None) -> tuple[str | None, str]:
    """The prompt, or why there is none."""
    prompt, why = typed, made.why
    if prompt is None and made.prompt is not None:
        prompt = _LORA.sub("", made.prompt).strip() or None  # pictures with and without a LoRA are compared
    if prompt is None:
        for path in _sidecars(file):
            try:
                prompt = read_bytes(path, PROMPT_BYTES).decode("utf-8-sig").strip() or None
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError) as error:
                why = f"{path.name} cannot be read: {error}"
            break
    if prompt is not None and len(prompt.encode()) > PROMPT_BYTES:
        return None, f"its prompt is longer than {PROMPT_BYTES:,} bytes"
    return (prompt, "") if prompt is not None else (None, why)


def _digest(file: Path) -> str | None:
    try:
        return sha256_file(file)
    except OSError:
        return None


def prompt_key(prompt: str) -> str:
    """A short name for a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
