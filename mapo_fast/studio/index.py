"""The index of a project: an SQLite file in the user's cache folder, which can be deleted at any time.

It is keyed by the project's path. A damaged index, or one of another format, is deleted and made again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mapo_fast.util.files import disk_errors

FORMAT = 1
_SCHEMA = """
create table pictures(
    id integer primary key, path text not null unique, bytes integer not null, changed integer not null,
    format text not null default '', width integer not null default 0, height integer not null default 0,
    prompt text, typed integer not null default 0, why text not null default '',
    broken text not null default '', model text not null default '', sampler text not null default '',
    lora text not null default '', seed text not null default '',
    digest text, of integer, look blob, colour real
);
create index by_prompt on pictures(prompt, id) where broken = '';
create index by_bytes on pictures(bytes);
create index by_digest on pictures(digest);
create table near(one integer not null, other integer not null, distance integer not null);
"""


def cache_folder() -> Path:
    """The user's cache folder for studios."""
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(local or Path.home() / ".cache") / "mapo_fast" / "studio"


def index_folder(project: Path) -> Path:
    """The folder in the cache for a project's index and thumbnails."""
    return cache_folder() / hashlib.sha256(os.fsencode(project.resolve())).hexdigest()[:20]


class Index:
    """A connection that several threads share."""

    def __init__(self, folder: Path) -> None:
        self.lock = threading.RLock()
        path = folder / "index.sqlite"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._open(path)
        except sqlite3.DatabaseError:
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                with suppress(FileNotFoundError):
                    (folder / name).unlink()
            self._open(path)

    def _open(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        try:
            self._database.execute("pragma trusted_schema = off")
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            (found,) = self._database.execute("pragma user_version").fetchone()
            if found == 0:
                self._database.executescript(f"begin; {_SCHEMA} pragma user_version = {FORMAT}; commit;")
            elif found != FORMAT:
                raise sqlite3.DatabaseError("another format")
        except sqlite3.DatabaseError:
            self._database.close()
            raise

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.lock:
            return self._database.execute(sql, values).fetchall()

    def write(self, sql: str, many: Iterable[Sequence[object]]) -> None:
        """Run a statement for each row of values, in one transaction."""
        with self.lock:
            self._database.execute("begin immediate")
            try:
                self._database.executemany(sql, many)
            except BaseException:
                self._database.execute("rollback")
                raise
            self._database.execute("commit")

    def close(self) -> None:
        """Close the file."""
        with self.lock:
            self._database.close()
