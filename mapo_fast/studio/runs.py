"""Training runs as a page shows them, read from their folders without torch.

Runs that were started on the command line count too: what is read is what every run writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mapo_fast.run.folder import RECORD, RESULTS
from mapo_fast.run.log import LOG_FILE, read_log
from mapo_fast.studio.jobs import is_held
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import disk_errors
from mapo_fast.util.signals import STOP_FILE

FOLDER = "runs"
State = Literal["running", "finished", "stopped"]
_RECENT = 20
"""Steps in the log that the speed is taken from."""
_MODELS = (".safetensors",)


class Run(NamedTuple):
    """A run's state and its figures."""

    name: str
    folder: Path
    state: State
    """Stopped is whatever is neither running nor finished; it can be resumed."""
    step: int
    steps: int
    started: float
    """Unix seconds; of the last session."""
    seconds_left: float | None
    figures: dict[str, Any]
    """The last line of the log about a step: loss, margin, errors, accuracy."""
    evaluation: dict[str, Any]
    """The last held-out figures, with their changes against the start model."""
    warnings: list[str]
    history: list[dict[str, Any]]
    """All lines about steps."""
    evaluations: list[dict[str, Any]]
    previews: list[Path]
    """Previews of the last step that has some."""
    files: list[Path]
    """What the run made."""


def runs(project: Path) -> list[Run]:
    """The runs in a project, the newest first; folders without a readable log are left out."""
    found = []
    for record in (project / FOLDER).glob(f"*/{RECORD}"):
        try:
            found.append(run(record.parent))
        except UserError:
            continue
    return sorted(found, key=lambda one: one.started, reverse=True)


def find(project: Path, name: str) -> Run:
    """A run of a project by its name.

    Raises:
        UserError: there is none.
    """
    for record in (project / FOLDER).glob(f"*/{RECORD}"):
        if record.parent.name == name:
            return run(record.parent)
    raise UserError(f"there is no run {shown(name)}")


def run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: it has no readable log.
    """
    log = read_log(folder / LOG_FILE)
    starts = [entry for entry in log if entry["event"] == "start"]
    steps = [entry for entry in log if entry["event"] == "step"]
    evaluations = [entry for entry in log if entry["event"] == "evaluation"]
    total = int(starts[-1].get("total_steps", 0)) if starts else 0
    last = max((entry["step"] for entry in log), default=0)
    ended = bool(log) and log[-1]["event"] == "end" and log[-1].get("finished") is True
    state: State = "running" if is_held(folder) else "finished" if ended else "stopped"
    return Run(
        folder.name,
        folder,
        state,
        last,
        total,
        float(starts[-1].get("time", 0.0)) if starts else 0.0,
        _seconds_left(steps, total) if state == "running" else None,
        steps[-1] if steps else {},
        evaluations[-1] if evaluations else {},
        [str(entry.get("message", "")) for entry in log if entry["event"] == "warning"],
        steps,
        evaluations,
        _previews(folder),
        [path for name in RESULTS for path in sorted((folder / name).glob("*")) if path.suffix in _MODELS],
    )


def stop(folder: Path) -> None:
    """Ask a run to stop after its step, wherever it was started.

    Raises:
        UserError: the disk.
    """
    path = folder / STOP_FILE
    with disk_errors(path):
        path.touch()


def _seconds_left(steps: Sequence[dict[str, Any]], total: int) -> float | None:
    """By the speed of the last lines; pauses for evaluations count in it."""
    recent = steps[-_RECENT:]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    each = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    left = float(each * (total - recent[-1]["step"]))
    return left if math.isfinite(left) and left >= 0 else None


def _previews(folder: Path) -> list[Path]:
    """Links are left out: a run from elsewhere could point anywhere."""
    for path in sorted((folder / "previews").glob("step-*"), reverse=True):
        if found := sorted(file for file in path.glob("*.png") if not file.is_symlink()):
            return found
    return []
