"""One studio for each project: a lock that ends with its process, and the name of who holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mapo_fast.util.errors import MachineError, UserError, shown
from mapo_fast.util.files import disk_errors, read_json, write_json

LOCK, HOLDER = ".studio.lock", ".studio.holder.json"
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "fuse.rclone", "davfs")
_MOUNTS = Path("/proc/self/mounts")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a project's folder for this process.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    with disk_errors(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is open in another studio ({_holder(folder)}): use that one or stop it"
            ) from None
        except NotImplementedError:
            raise MachineError(f"cannot lock {folder}: its file system has no locks; use another") from None
    try:
        write_json(folder / HOLDER, {"host": socket.gethostname(), "process": os.getpid()})
        yield
    finally:
        lock.release()


def _holder(folder: Path) -> str:
    try:
        found = read_json(folder / HOLDER)
        return f"process {shown(found['process'])} on {shown(found['host'])}"
    except (UserError, KeyError):
        return "on an unknown host"


def network_drive(folder: Path) -> str | None:
    """One sentence where the folder is on a network drive, as far as the system says."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    path, kind = folder.resolve(), ""
    longest = 0
    for line in lines:
        parts = line.split()
        if len(parts) < 3:
            continue
        mounted = Path(_unescaped(parts[1]))
        if path.is_relative_to(mounted) and len(mounted.parts) >= longest:
            longest, kind = len(mounted.parts), parts[2]
    if kind not in _NETWORK:
        return None
    return (
        f"this project is on a network drive ({kind}): votes are safe there when the server confirms them, "
        "the lock may not hold between computers, so open it on one computer at a time"
    )


def _unescaped(text: str) -> str:
    """A mount's path, in which spaces and the like are written as octal numbers."""
    for code in ("\\040", "\\011", "\\012", "\\134"):
        text = text.replace(code, chr(int(code[1:], 8)))
    return text
