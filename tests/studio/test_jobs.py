"""Jobs outlive what started them, are found again, stopped by a file, and resumed after any end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mapo_fast.studio import jobs
from mapo_fast.studio.jobs import Job
from mapo_fast.util.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals"),
]

SLEEPER = (
    "import time\nfrom mapo_fast.studio import job\n"
    "job._run = lambda argv: print('works', flush=True) or time.sleep(60)\n"
    "real = job._run\n"
    "def run(argv):\n    try:\n        return real(argv)\n    except KeyboardInterrupt:\n        return 130\n"
    "job._run = run\njob.main()\n"
)
"""A job that works until it is stopped."""


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs._process
    monkeypatch.setattr(
        jobs, "_process", lambda command, *rest: real([sys.executable, "-c", SLEEPER, command[-1]], *rest)
    )


@pytest.fixture
def in_background() -> Iterator[None]:
    """As a script's `mapo-fast studio … &` has it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    """Waits until a job has ended; in the end all are stopped."""

    def wait(id: str) -> Job:
        for _ in range(600):
            if (job := jobs.find(tmp_path, id)).state != "running":
                return job
            time.sleep(0.05)
        raise AssertionError(jobs.find(tmp_path, id).log)

    yield wait
    for job in jobs.jobs(tmp_path):
        if job.state == "running":
            jobs.stop(tmp_path, job.id)
            wait(job.id)


def working(project: Path, id: str) -> Job:
    for _ in range(400):
        if "works" in (job := jobs.find(project, id)).log and job.pid is not None:
            return job
        time.sleep(0.05)
    raise AssertionError(job.log)


def test_a_command_ends_as_on_the_command_line(
    tmp_path: Path, ended: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    assert not {"SECRET_TOKEN", "PYTHONSTARTUP"} & jobs.environment().keys()
    job = jobs.start(tmp_path, "train", ["train", "--", "$(touch hit).toml"])
    assert job.state == "running"
    job = ended(job.id)
    assert (job.state, job.code, job.can_resume) == ("failed", 2, True)
    assert job.log == "mapo-fast: config file not found: $(touch hit).toml\n"
    assert [path.name for path in tmp_path.iterdir() if path.name != "user-cache"] == ["jobs"]


@pytest.mark.usefixtures("sleeper", "in_background")
def test_stopped_by_a_file_and_resumed(tmp_path: Path, ended: Callable[[str], Job]) -> None:
    first = jobs.start(tmp_path, "train", ["train"])
    second = jobs.start(tmp_path, "candidates", ["sample"])
    assert [job.id for job in jobs.jobs(tmp_path)] == ["0002-candidates", "0001-train"]
    working(tmp_path, first.id)
    jobs.stop(tmp_path, first.id)
    assert ended(first.id).state == "stopped"
    assert jobs.find(tmp_path, second.id).state == "running"
    assert jobs.resume(tmp_path, first.id).state == "running"
    with pytest.raises(UserError, match="is running and cannot be resumed"):
        jobs.resume(tmp_path, first.id)


@pytest.mark.usefixtures("sleeper")
def test_killed_it_is_shown_as_such_and_resumed(tmp_path: Path, ended: Callable[[str], Job]) -> None:
    job = working(tmp_path, jobs.start(tmp_path, "train", ["train"]).id)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job = ended(job.id)
    assert (job.state, job.can_resume) == ("killed", True)
    assert jobs.resume(tmp_path, job.id).state == "running"


def test_it_outlives_the_server(tmp_path: Path, ended: Callable[[str], Job]) -> None:
    server = (
        "import sys, time\nfrom pathlib import Path\nfrom mapo_fast.studio import jobs\n"
        "real = jobs._process\n"
        f"jobs._process = lambda c, *r: real([sys.executable, '-c', {SLEEPER!r}, c[-1]], *r)\n"
        f"print(jobs.start(Path({str(tmp_path)!r}), 'train', ['train']).id, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", server], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        id = process.stdout.readline().decode().strip()
        working(tmp_path, id)
        os.killpg(process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert jobs.find(tmp_path, id).state == "running"
    jobs.stop(tmp_path, id)
    assert ended(id).state == "stopped"


def test_commands_of_a_project_from_elsewhere_are_not_run(
    tmp_path: Path, ended: Callable[[str], Job]
) -> None:
    job = ended(jobs.start(tmp_path, "train", ["train", "--", "no.toml"]).id)
    path = job.folder / "job.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "argv": ["train", "--code", "evil.py"]}))
    assert not jobs.find(tmp_path, job.id).can_resume
    with pytest.raises(UserError, match="start it again from its form"):
        jobs.resume(tmp_path, job.id)
    path.write_text(json.dumps({**record, "seal": "0" * 64}))
    assert not jobs.find(tmp_path, job.id).can_resume
    with pytest.raises(UserError, match="cannot be a job"):
        jobs.start(tmp_path, "train", ["rm", "-rf"])
