"""Runs are read from their folders, whoever started them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapo_fast.studio import runs
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import exclusive
from tests.studio.pictures import painted


def folder_of(project: Path, name: str, *lines: dict[str, object]) -> Path:
    folder = project / "runs" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


START = {"event": "start", "step": 0, "time": 100.0, "run": "x", "total_steps": 50}
STEPS = [
    {"event": "step", "step": 5 * n, "time": 100.0 + 10 * n, "loss": 1 / n, "margin": "nan"}
    for n in range(1, 5)
]


def test_what_a_run_says_while_it_runs_and_after(tmp_path: Path) -> None:
    warning = {"event": "warning", "step": 10, "time": 1.0, "message": "look at me"}
    folder = folder_of(tmp_path, "a", START, *STEPS, warning)
    painted(folder / "previews" / "step-00000010" / "p.png", 1)
    (folder / "previews" / "step-00000020").mkdir()
    with exclusive(folder):
        (run,) = runs.runs(tmp_path)
    assert (run.state, run.step, run.steps) == ("running", 20, 50)
    assert run.seconds_left == pytest.approx(60.0)
    assert run.figures["loss"] == 0.25
    assert run.figures["margin"] != run.figures["margin"]
    assert (run.warnings, [path.name for path in run.previews]) == (["look at me"], ["p.png"])
    assert (runs.find(tmp_path, "a").state, run.files) == ("stopped", [])
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"event": "end", "step": 50, "time": 200.0, "finished": True}) + "\n")
    painted(folder / "lora" / "a.safetensors.png", 1).rename(folder / "lora" / "a.safetensors")
    run = runs.find(tmp_path, "a")
    assert (run.state, run.seconds_left, [path.name for path in run.files]) == (
        "finished",
        None,
        ["a.safetensors"],
    )


def test_the_newest_is_first_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, "old", START)
    folder_of(tmp_path, "new", {**START, "time": 300.0})
    folder_of(tmp_path, "empty")
    (folder_of(tmp_path, "none") / "log.jsonl").unlink()
    assert [run.name for run in runs.runs(tmp_path)] == ["new", "old", "empty"]
    with pytest.raises(UserError, match="there is no run"):
        runs.find(tmp_path, "../x")


def test_a_stop_file_is_what_training_looks_for(tmp_path: Path) -> None:
    from mapo_fast.util.signals import StopRequest

    folder = folder_of(tmp_path, "a", START)
    runs.stop(folder)
    assert StopRequest(folder).requested
