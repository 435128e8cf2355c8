"""Candidates and training as jobs, killed again and again: what is made is the same. For `make proof`."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from mapo_fast.score.manifest import read
from mapo_fast.studio import jobs
from mapo_fast.studio.runs import find
from mapo_fast.util.files import sha256_file
from tests.training import make_cache, settings

pytestmark = [
    pytest.mark.proof,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals"),
]
KILLS = 50
"""Kills of jobs of each kind."""


def until_finished(project: Path, id: str, rng: random.Random, most: int, longest: float) -> int:
    """Kill a job at random moments and resume it; the number of kills."""
    kills = 0
    while True:
        end = time.monotonic() + rng.uniform(0.5, longest)
        while (job := jobs.find(project, id)).state == "running" and (
            kills >= most or time.monotonic() < end or job.pid is None
        ):
            time.sleep(0.02)
        if job.state == "finished":
            return kills
        if job.state == "running" and job.pid is not None:
            os.kill(job.pid, signal.SIGKILL)
            kills += 1
            while (job := jobs.find(project, id)).state == "running":
                time.sleep(0.02)
        assert (job.state, job.can_resume) in (("killed", True), ("finished", False)), job.log
        if job.state == "killed":
            jobs.resume(project, id)


def test_candidates_are_the_same_after_kills(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(20)))
    rng, kills, made = random.Random(0), 0, []
    while kills < KILLS or len(made) < 2:
        out = f"candidates/{len(made)}"
        (tmp_path / "candidates").mkdir(exist_ok=True)
        argv = ["sample", "--prompts", "prompts.txt", "--out", out, "--size", "64x64", "--steps", "4"]
        id = jobs.start(tmp_path, "candidates", [*argv, "--", str(tiny_sdxl)]).id
        kills += until_finished(tmp_path, id, rng, 10 if made else 0, longest=9.0)
        images = read(tmp_path / out)
        assert len(images) == 20
        made.append({image.prompt: sha256_file(image.path) for image in images})
    assert all(one == made[0] for one in made)


def test_training_goes_on_after_kills(tiny_sdxl: Path, tmp_path: Path) -> None:
    cache = make_cache(tiny_sdxl, tmp_path / "data")
    rng, kills, made = random.Random(0), 0, []
    while kills < KILLS or len(made) < 2:
        name = f"run{len(made)}"
        table = settings(tiny_sdxl, cache, tmp_path / "runs" / name, train={"steps": 40})
        lines = [
            f"{section}.{key} = {json.dumps(value)}\n"
            for section, values in table.items()
            for key, value in values.items()
        ]
        (tmp_path / f"{name}.toml").write_text("".join(lines))
        id = jobs.start(tmp_path, "train", ["train", "--resume", "--", f"{name}.toml"]).id
        kills += until_finished(tmp_path, id, rng, 10 if made else 0, longest=12.0)
        run = find(tmp_path, name)
        assert (run.state, run.step) == ("finished", 40)
        made.append([sha256_file(file) for file in run.files])
    assert made[0]
    assert all(one == made[0] for one in made)
