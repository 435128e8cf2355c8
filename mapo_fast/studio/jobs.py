"""Jobs: processes that outlive the browser and the server, and are found again by their folders.

A job is a folder `jobs/NUMBER-KIND` in the project; `job` says what is in it. Its process holds a lock there,
so a job whose process is gone is known without its pid. A file `stop` in the folder stops it. Commands of
`mapo-fast` go on where they stopped, so a job that has ended early is resumed by the same command.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from mapo_fast.studio.job import ENDED, JOB, LOCK, LOG, PROCESS
from mapo_fast.studio.seal import is_sealed, seal
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import disk_errors, open_regular, read_json, write_json
from mapo_fast.util.signals import STOP_FILE, exit_code

FOLDER = "jobs"
COMMANDS = ("train", "prepare", "sample", "plan", "evaluate", "export", "report", "looks")
"""What a job may run."""
State = Literal["running", "finished", "failed", "stopped", "killed"]
_STARTING = 60.0
"""Seconds that a new process may take until it holds its lock."""
_KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT",
    "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "PROGRAMDATA",
    "NUMBER_OF_PROCESSORS", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
)  # fmt: skip
_KEPT_GROUPS = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "OMP_", "MKL_", "HF_", "TRITON_", "TORCH")
_LARGEST_TAIL = 1 << 16
_CHILDREN: list[subprocess.Popen[bytes]] = []
"""Processes of this server's jobs, which are waited for when they end."""


@dataclass(frozen=True)
class Job:
    """A job as it is now."""

    id: str
    kind: str
    argv: tuple[str, ...]
    folder: Path
    started: float
    """Unix seconds."""
    state: State
    code: int | None
    """Exit code of one that has ended."""
    pid: int | None
    can_resume: bool

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return tail(self.folder / LOG)


def start(project: Path, kind: str, argv: Sequence[str]) -> Job:
    """Start a command of `mapo-fast` as a job.

    Args:
        project: the folder of a project; relative paths in `argv` begin there.
        kind: a short word for lists.
        argv: the command and its arguments, without `mapo-fast`.

    Raises:
        UserError: the command is no job's, or the disk.
    """
    if not kind.isalnum() or not argv or argv[0] not in COMMANDS or any("\0" in word for word in argv):
        raise UserError(f"{shown(list(argv))} cannot be a job: it must be one of {', '.join(COMMANDS)}")
    folder = _new_folder(project / FOLDER, kind)
    record = {"kind": kind, "argv": list(argv), "folder": str(folder), "started": time.time()}
    write_json(folder / JOB, {**record, "seal": seal(record)})
    _launch(project, folder)
    return _read(folder)


def resume(project: Path, id: str) -> Job:
    """Start a job that has ended early again, in its folder.

    Raises:
        UserError: it is running or finished, or was not started by this user here.
    """
    job = find(project, id)
    if not job.can_resume:
        raise UserError(f"job {job.id} is {job.state} and cannot be resumed: start it again from its form")
    for name in (STOP_FILE, ENDED, PROCESS):
        with disk_errors(job.folder):
            (job.folder / name).unlink(missing_ok=True)
    os.utime(job.folder / JOB)
    _launch(project, job.folder)
    return _read(job.folder)


def stop(project: Path, id: str) -> None:
    """Ask a job to stop; it saves what is finished.

    Raises:
        UserError: there is no such job, or the disk.
    """
    path = find(project, id).folder / STOP_FILE
    with disk_errors(path):
        path.touch()


def find(project: Path, id: str) -> Job:
    """A job by its id.

    Raises:
        UserError: there is none.
    """
    for job in jobs(project):
        if job.id == id:
            return job
    raise UserError(f"there is no job {shown(id)}")


def jobs(project: Path) -> list[Job]:
    """All jobs of a project, the newest first; folders that are no jobs are left out."""
    for child in _CHILDREN:
        child.poll()
    found = []
    for path in sorted((project / FOLDER).glob("[0-9]*-*"), reverse=True):
        with suppress(UserError, KeyError, TypeError, ValueError):
            found.append(_read(path))
    return found


def tail(path: Path) -> str:
    """The last lines of a text file; empty where it cannot be read or is a link."""
    try:
        if path.is_symlink():
            return ""
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LARGEST_TAIL))
            return file.read(_LARGEST_TAIL).decode("utf-8", "replace")
    except OSError:
        return ""


def _read(folder: Path) -> Job:
    record = read_json(folder / JOB)
    given = {name: record[name] for name in ("kind", "argv", "folder", "started")}
    state, code = _state(folder)
    mine = given["folder"] == str(folder) and is_sealed(given, record.get("seal"))
    return Job(
        folder.name,
        str(given["kind"]),
        tuple(map(str, given["argv"])),
        folder,
        float(given["started"]),
        state,
        code,
        _optional(folder / PROCESS).get("pid"),
        mine and state in ("stopped", "killed", "failed"),
    )


def _state(folder: Path) -> tuple[State, int | None]:
    if is_held(folder):
        return "running", None
    ended = _optional(folder / ENDED)  # read after the lock: it is written before the lock is given back
    code = ended.get("code")
    if isinstance(code, int):
        stopped = code in (exit_code(None), exit_code(15))
        return ("finished" if code == 0 else "stopped" if stopped else "failed"), code
    if not (folder / PROCESS).exists() and time.time() - (folder / JOB).stat().st_mtime < _STARTING:
        return "running", None
    return "killed", None


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock of a folder: of a job or of a run."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a read-only project: nothing runs there
        return False
    lock.release()
    return False


def _optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def _new_folder(parent: Path, kind: str) -> Path:
    with disk_errors(parent):
        parent.mkdir(exist_ok=True)
        last = max((int(path.name.split("-")[0]) for path in parent.glob("[0-9]*-*")), default=0)
        folder = parent / f"{last + 1:04d}-{kind}"
        folder.mkdir()
    return folder


def _launch(project: Path, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "mapo_fast.studio.job", str(folder)]
    own: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        own = {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    with disk_errors(folder / LOG), (folder / LOG).open("ab") as log:
        _CHILDREN.append(_process(command, project, log, own))


def _process(
    command: list[str], project: Path, log: IO[bytes], own: dict[str, Any]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=project, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **own
    )


def environment() -> dict[str, str]:
    """What a job sees of this process's environment, and where this program is."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in _KEPT or name.upper().startswith(_KEPT_GROUPS)
    }
    roots = [
        spec.origin for name in ("mapo_fast", "mapo_kernels") if (spec := importlib.util.find_spec(name))
    ]
    paths = [str(Path(origin).parent.parent) for origin in roots if origin]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}
