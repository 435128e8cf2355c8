"""One rule for what the system refuses, and reads that end."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.util import files
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.files import (
    atomic_path,
    disk_errors,
    exclusive,
    os_error,
    read_bytes,
    read_json,
    sha256_file,
    write_json,
)

MACHINE = {
    "EAGAIN", "EBADF", "EBUSY", "EDQUOT", "EFBIG", "EINTR", "EIO", "EMFILE", "EMLINK", "ENFILE", "ENODEV",
    "ENOLCK", "ENOMEM", "ENOSPC", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ECONNRESET", "EHOSTDOWN",
}  # fmt: skip
INPUT = {
    "EACCES", "EEXIST", "EILSEQ", "EINVAL", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOENT", "ENOTDIR",
    "ENOTEMPTY", "ENXIO", "EPERM", "EROFS",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(n for n in MACHINE | INPUT if hasattr(errno, n)))
def test_a_system_error_is_the_machine_s_or_the_path_s(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)
    with (
        pytest.raises(UserError, match=f"cannot write {tmp_path}/x: .+") as caught,
        disk_errors(tmp_path / "x"),
    ):
        raise OSError(number, os.strerror(number), "elsewhere")
    assert isinstance(caught.value, MachineError) == (name in MACHINE)
    assert "\n" not in str(caught.value)


def test_damaged_contents_are_not_the_machine_s_fault() -> None:
    """An OSError without a number, as pyarrow and Pillow raise them."""
    assert os_error(OSError("Corrupt snappy compressed data."), "read x").exit_code == 2


def test_a_library_s_own_error_for_a_system_error_is_the_same(tmp_path: Path) -> None:
    text = 'Error while serializing: I/O error: Os {{ code: {}, kind: Other, message: "..." }}'
    for number, kind in ((errno.ENOSPC, MachineError), (errno.EIO, MachineError), (errno.EACCES, UserError)):
        with pytest.raises(kind), disk_errors(tmp_path):
            raise RuntimeError(text.format(number))
    with pytest.raises(RuntimeError, match="a bug"), disk_errors(tmp_path):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("read", [lambda path: read_bytes(path, 100), sha256_file])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "fifo")
    paths = (tmp_path, tmp_path / "fifo", Path("/dev/zero"))
    for path in paths:
        with pytest.raises(OSError, match="not a regular file"):
            read(path)
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        assert not {fd.resolve() for fd in descriptors.iterdir()} & {path.resolve() for path in paths}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[]", "not a JSON object"),
        (b"", "JSON"),
        (b'{"a": 1', "JSON"),
    ],
)
def test_json_that_is_none_is_one_line(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=said) as caught:
        read_json(path)
    assert "a.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_made_a_write_fail_is_what_is_said(tmp_path: Path) -> None:
    """The temporary file cannot be removed either."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        write_json(tmp_path / "file" / "a.json", {})


def test_a_file_system_that_cannot_flush_folders_keeps_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refusing(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", refusing)
    write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}

    def failing(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", failing)
    with (
        pytest.raises(MachineError, match="Input/output error"),
        atomic_path(tmp_path / "a.json") as temporary,
    ):
        temporary.write_text("{}")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: Any, timeout: float) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.raises(MachineError, match="has no locks"), exclusive(tmp_path):
        pass
