"""Files that are either whole or absent: hashing, atomic writes, one-line errors for a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mapo_fast.errors import UserError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be flushed on Windows and are left alone there."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and rename it over `path`.

    On any error the temporary file is removed and whatever stood at `path` stays.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while writing `path` into one `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(_FULL.format(path=path)) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{path} is larger than this file system or a limit of this account allows"
            ) from error
        if error.errno in _REFUSALS:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's text inside.
        if "No space left" in str(error) or "StorageFull" in str(error):
            raise UserError(_FULL.format(path=path)) from error
        raise


_FULL = "disk full while writing {path}: free some space and go on (train continues with --resume)"
_REFUSALS = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an existing folder for this process alone; the hold ends with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(folder / ".lock")
    with disk_errors(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another mapo-fast process: wait for it or stop it"
            ) from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
