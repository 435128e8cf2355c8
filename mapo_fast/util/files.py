"""Reading and writing files: bounded reads, writes that are whole or absent, one line for every error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mapo_fast.util.errors import MachineError, UserError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a regular file, read in 1 MiB pieces. Raises `OSError` where it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
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
    except OSError as error:
        # Some file systems (FUSE, CIFS) cannot flush folders: what was written there is whole all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path next to `path`; on success fsync it and rename it over `path`.

    On any error the temporary file is removed and an existing file at `path` stays.

    Raises:
        UserError: the disk is full or `path` cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        with suppress(OSError):  # what made it fail is what matters
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn any error of the file system while writing `path` into one `UserError`.

    Raises:
        MachineError: the disk is full, I/O failed or the machine ran out of something.
        UserError: the path cannot be written: its name, its kind or its permissions.
    """
    try:
        yield
    except OSError as error:
        raise os_error(error, f"write {path}") from error
    except Exception as error:
        # safetensors raises an error of its own, with the system's number in its text.
        if found := re.search(r"Os \{ code: (\d+)", str(error)):
            system = OSError(int(found[1]), os.strerror(int(found[1])))
            raise os_error(system, f"write {path}") from error
        raise


def os_error(error: OSError, doing: str) -> UserError:
    """One line for an error of the system; `doing` is a verb and a path, such as "read a/b.json"."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(_FULL.format(doing=doing))
    return _kind_of(error)(f"cannot {doing}: {_reason(error, doing)}")


def unreadable(what: str, error: OSError) -> UserError:
    """One line for an unreadable file; `what` names its setting and path, such as "data.cache a/b"."""
    return _kind_of(error)(f"{what} cannot be read: {_reason(error, what)}")


def _kind_of(error: OSError) -> type[UserError]:
    # Libraries raise OSError without a number for contents that they cannot read.
    return UserError if error.errno is None or error.errno in _INPUT else MachineError


def _reason(error: OSError, said: str) -> str:
    """The system's reason, with the file's name unless `said` has it already."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason} ({error.filename})" if error.filename and str(error.filename) not in said else reason


def one_line(error: Exception) -> UserError | None:
    """The error to show as one line: a `UserError`, or an unforeseen failure of the machine.

    None for every other exception: a mistake in the program, whose trace is worth having.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return os_error(error, "go on")
    first = (str(error).splitlines() or [""])[0]
    # torch's own type is not imported for this, and on the CPU it raises a RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_RAM.search(first):
        said = re.sub(r"^\[enforce fail[^\]]*\] (err == 0\. )?", "", first)
        return MachineError(
            f"out of memory{said and f': {said}'}; choose smaller settings, train.pairs_per_batch first"
        )
    return None


_NO_RAM = re.compile("DefaultCPUAllocator: (can't allocate memory|not enough memory)")
_FULL = "cannot {doing}: the disk is full; free some space and go on (train continues with --resume)"
_INPUT = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EILSEQ,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.ENXIO,
        errno.EOVERFLOW,
        errno.EPERM,
        errno.EROFS,
    }
)
"""Error numbers that a path causes; all others are the machine's."""


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; links are followed.

    A FIFO or a device neither hangs it nor fills memory.

    Raises:
        OSError: also where it is not a regular file (EINVAL) or larger (EOVERFLOW); `strerror` says so.
    """
    data = bytearray()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # In pieces: read(limit) would allocate the limit before it reads the first byte.
        while max(size, len(data)) <= limit and (piece := file.read(1 << 18)):
            data += piece
    if max(size, len(data)) > limit:
        raise OSError(errno.EOVERFLOW, f"it is larger than the limit of {limit:,} bytes", str(path))
    return bytes(data)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file to read; links are followed.

    Raises:
        OSError: also where it is not a regular file (EINVAL): a FIFO would wait for its writer for ever.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        check_regular(path, os.fstat(handle).st_mode)
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def check_regular(path: Path, mode: int) -> None:
    """Raise `OSError` (EINVAL) where `mode` is not a regular file's; its `strerror` says what it is."""
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_kind(mode)}, not a regular file", str(path))


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


JSON_BYTES = 1 << 26
"""Largest JSON file that is read whole: configs, records of runs, indexes."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads` with one kind of exception.

    Raises:
        ValueError: not UTF-8 or not JSON, a number of thousands of digits, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MachineError: I/O failed.
        UserError: missing, not a regular file, larger than `JSON_BYTES`, not JSON, or not an object.
    """
    try:
        value = parse_json(read_bytes(path, JSON_BYTES))
    except OSError as error:
        raise os_error(error, f"read {path}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an existing folder for this process alone; the hold ends with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout  # later than all checks, which are to be quick

    lock = FileLock(folder / ".lock")
    with disk_errors(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another mapo-fast process: wait for it or stop it"
            ) from None
        except NotImplementedError:
            raise MachineError(f"cannot lock {folder}: its file system has no locks; use another") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
