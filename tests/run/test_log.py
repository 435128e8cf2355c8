"""The run log: strict JSON lines, no duplicates after a resume, TensorBoard, console, missing parts."""

from __future__ import annotations

import builtins
import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mapo_fast.run.log import RunLog, read_log
from mapo_fast.util.console import Terminal
from mapo_fast.util.errors import UserError

FIGURES: dict[str, float | None] = {
    "loss": 0.5,
    "chosen_error": 0.1,
    "rejected_error": 0.2,
    "margin": 0.1,
    "saturation": 0.25,
    "accuracy": 0.75,
    "grad_norm": 1.5,
    "lr": 1e-5,
    "pairs_per_s": 2.0,
    "peak_memory_mib": 1000.0,
    "skipped_steps": 0.0,
}
EVALUATION: dict[str, Any] = {
    "pairs": 8,
    "accuracy": 0.53,
    "accuracy_start": 0.5,
    "accuracy_change": {"mean": 0.03, "low": 0.01, "high": 0.05},
    "margin_change": {"mean": 0.001, "low": None, "high": None},
    "drift": 0.002,
}


@pytest.fixture(autouse=True)
def _no_tensorboard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening TensorBoard takes a while; only its own tests do."""
    if "tensorboard" not in request.node.name:
        monkeypatch.setattr(RunLog, "_open_tensorboard", lambda self, folder: None)


def plain() -> Terminal:
    return Terminal(Console(file=io.StringIO(), force_terminal=False, width=80))


def text(terminal: Terminal) -> str:
    return terminal.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def run(folder: Path, steps: range, terminal: Terminal | None = None, start_step: int = 0) -> None:
    with RunLog(folder, 100, terminal, start_step=start_step) as log:
        if start_step == 0:
            log.evaluation(0, EVALUATION)
        for step in steps:
            log.advance(step)
            if step % 10 == 0:
                log.step(step, {**FIGURES, "loss": step / 100})


def events(folder: Path) -> list[tuple[str, int]]:
    return [(entry["event"], entry["step"]) for entry in read_log(folder / "log.jsonl")]


def test_every_event_is_a_line_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", 100, None) as log:
        for count, write in enumerate(
            (
                lambda: log.step(10, FIGURES),
                lambda: log.evaluation(10, EVALUATION),
                lambda: log.warning(10, "careful"),
                lambda: log.end(10, finished=False),
            ),
            start=2,
        ):
            write()
            lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
            assert len(lines) == count
    entries = [json.loads(line) for line in lines]
    assert [entry["event"] for entry in entries] == ["start", "step", "evaluation", "warning", "end"]
    assert {name: entries[1][name] for name in FIGURES} == FIGURES
    assert entries[2]["accuracy_change"] == EVALUATION["accuracy_change"]
    assert entries[3]["message"] == "careful"
    assert entries[4]["finished"] is False
    assert entries[0]["total_steps"] == 100


def test_non_finite_figures_stay_visible_and_the_json_strict(tmp_path: Path) -> None:
    with RunLog(tmp_path, 10, plain()) as log:
        log.step(1, {"loss": math.nan, "grad_norm": math.inf, "margin": -math.inf, "lr": None})
        log.evaluation(
            1, {"drift": math.nan, "accuracy_change": {"mean": math.nan, "low": None, "high": None}}
        )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    strict = [json.loads(line, parse_constant=refuse) for line in lines]
    assert (strict[1]["loss"], strict[1]["grad_norm"], strict[1]["margin"]) == ("nan", "inf", "-inf")
    assert "lr" not in strict[1]
    read = read_log(tmp_path / "log.jsonl")
    assert math.isnan(read[1]["loss"])
    assert read[1]["grad_norm"] == math.inf
    assert math.isnan(read[2]["accuracy_change"]["mean"])


def test_a_resumed_log_has_no_step_twice(tmp_path: Path) -> None:
    run(tmp_path, range(1, 56))
    before = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    run(tmp_path, range(31, 61), start_step=30)
    after = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert after[:5] == before[:5]  # start, evaluation, steps 10 to 30: untouched
    steps = [step for event, step in events(tmp_path) if event == "step"]
    assert steps == [10, 20, 30, 40, 50, 60]
    assert events(tmp_path).count(("start", 30)) == 1


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, range(1, 31))
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"event": "step", "step": 3', encoding="utf-8")
    assert events(tmp_path)[-1] == ("step", 30)
    run(tmp_path, range(31, 41), start_step=30)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    assert [step for event, step in events(tmp_path) if event == "step"] == [10, 20, 30, 40]


def warnings_of(folder: Path) -> list[str]:
    return [entry["message"] for entry in read_log(folder / "log.jsonl") if entry["event"] == "warning"]


def test_a_damaged_line_is_left_out_and_said(tmp_path: Path) -> None:
    run(tmp_path, range(1, 31))
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        path.read_bytes().replace(b'{"event": "step", "step": 20', b'{"event" "step", "step": 20')
    )
    run(tmp_path, range(31, 41), start_step=30)
    assert [step for event, step in events(tmp_path) if event == "step"] == [10, 30, 40]
    assert f"{path} had 1 damaged line(s), which are left out" in warnings_of(tmp_path)


def test_another_runs_log_is_moved_aside_and_said(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        with RunLog(tmp_path / name, 10, None, run=name) as log:
            log.step(1, FIGURES)
    other = (tmp_path / "other" / "log.jsonl").read_bytes()
    (tmp_path / "mine" / "log.jsonl").write_bytes(other)
    with RunLog(tmp_path / "mine", 10, None, start_step=1, run="mine"):
        pass
    assert [event for event, _ in events(tmp_path / "mine")] == ["start", "warning"]
    assert "was another run's" in warnings_of(tmp_path / "mine")[0]
    assert (tmp_path / "mine" / "of-another-run-log.jsonl").read_bytes() == other


def test_a_log_that_is_missing_is_said(tmp_path: Path) -> None:
    with RunLog(tmp_path, 10, None, start_step=4, run="mine"):
        pass
    assert warnings_of(tmp_path) == [
        f"{tmp_path / 'log.jsonl'} is missing: there are no figures up to step 4"
    ]


def test_starting_again_at_step_0_empties_the_log(tmp_path: Path) -> None:
    run(tmp_path, range(1, 31))
    run(tmp_path, range(1, 11))
    assert events(tmp_path) == [("start", 0), ("evaluation", 0), ("step", 10)]


def test_a_resumed_run_does_not_repeat_its_warnings(tmp_path: Path) -> None:
    def log_steps(first: int, last: int, start_step: int) -> None:
        with RunLog(tmp_path, 100, None, start_step=start_step) as log:
            for step in range(first, last):
                log.step(step, {**FIGURES, "saturated": 0.9})
                log.evaluation(step, {"drift": math.nan})

    log_steps(1, 30, 0)
    log_steps(21, 40, 20)
    warnings = [entry for entry in read_log(tmp_path / "log.jsonl") if entry["event"] == "warning"]
    assert len(warnings) == 1
    assert "saturated" in warnings[0]["message"]


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    terminal = plain()
    run(tmp_path, range(1, 21), terminal)
    lines = text(terminal).splitlines()
    assert lines[0] == (
        "held-out at step 0: accuracy 0.530; accuracy change +0.0300 [+0.0100, +0.0500]; "
        "margin change +0.0010; drift 0.002"
    )
    assert lines[1].startswith(
        "step 10/100  loss 0.1000  chosen error 0.1000  rejected error 0.2000  margin +0.1000  "
        "saturation 25%  accuracy 75%  grad norm 1.50  lr 1.0e-05  2.00 pairs/s  "
        "peak memory 1,000 MiB  ETA 0:00:0"
    )
    assert len(lines) == 3
    assert text(terminal).isascii()  # a Windows pipe may not take more


def test_markup_in_a_message_is_shown_as_it_is(tmp_path: Path) -> None:
    terminal = plain()
    with RunLog(tmp_path, 10, terminal) as log:
        log.warning(0, "see [train] and [/x]")
    assert "warning at step 0: see [train] and [/x]" in text(terminal)


def test_skipped_steps_are_shown_once_there_are_some(tmp_path: Path) -> None:
    terminal = plain()
    with RunLog(tmp_path, 10, terminal) as log:
        log.step(1, FIGURES)
        assert "skipped" not in text(terminal)
        log.step(2, {**FIGURES, "skipped_steps": 2.0})
    assert "skipped steps 2" in text(terminal)
    assert "warning at step 2: 2 step(s) had gradients that were not finite" in text(terminal)


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    terminal = Terminal(Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False))
    run(tmp_path, range(1, 41), terminal)
    assert "40/100" in text(terminal)
    assert "ETA" in text(terminal)
    assert "2.00 pairs/s" in text(terminal)
    assert "step 10/100" in text(terminal)


def test_the_bar_starts_where_a_resumed_run_does(tmp_path: Path) -> None:
    terminal = Terminal(Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False))
    with RunLog(tmp_path, 100, terminal, start_step=60):
        pass
    assert "60/100" in text(terminal)


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, None)
    log.close()
    log.close()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path, 10, None) as log:

        class Full:
            def write(self, _: str) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def close(self) -> None:
                pass

        log._file.close()
        monkeypatch.setattr(log, "_file", Full())
        with pytest.raises(UserError, match=r"cannot write .*log\.jsonl"):
            log.step(1, FIGURES)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_same_figures_and_purges_on_resume(tmp_path: Path) -> None:
    run(tmp_path, range(1, 56))
    run(tmp_path, range(31, 61), start_step=30)
    found = scalars(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [10, 20, 30, 40, 50, 60]
    assert found["train/loss"][0][1] == pytest.approx(0.1)
    assert found["held_out/accuracy_change/mean"] == [(0, pytest.approx(0.03))]
    assert "held_out/margin_change/low" not in found


def test_without_tensorboard_it_says_so_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    terminal = plain()
    run(tmp_path, range(1, 21), terminal)
    assert text(terminal).count("tensorboard is not installed") == 1
    assert [event for event, _ in events(tmp_path)] == ["start", "warning", "evaluation", "step", "step"]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_importing_the_log_imports_no_tensorboard() -> None:
    code = "import mapo_fast.run.log, sys; sys.exit('tensorboard' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_mirrors_tensorboard_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Fake:
        @staticmethod
        def init(**kwargs: object) -> type[Fake]:
            calls.append(kwargs)
            return Fake

        @staticmethod
        def finish() -> None:
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    with RunLog(tmp_path / "run", 3, None, wandb="sdxl"):
        pass
    assert calls == [
        {"project": "sdxl", "name": "run", "dir": str(tmp_path / "run"), "sync_tensorboard": True},
        "finished",
    ]


def test_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        RunLog(tmp_path / "run", 3, None, wandb="sdxl")


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"event": "step", "step": 1, "loss": ' + b"9" * 5000 + b"}",
        b'{"step": 1}',
        b'{"event": "step", "step": true}',
        b'{"event": "step", "step": -1}',
        b'{"event": "step", "step": 1, "chosen_error": "x"}',
        b'{"event": "step", "step": 1, "saturated": [1]}',
        b'{"event": "step", "step": 1, "skipped_steps": null}',
        b'{"event": "evaluation", "step": 1, "chosen_error": 0.1, "chosen_error_change": {}}',
        b'{"event": "evaluation", "step": 1, "drift": {}}',
        b"\xff\xfe\0",
        b"null",
        b"",
    ],
)
def test_what_is_no_line_of_a_log_is_left_out(tmp_path: Path, line: bytes) -> None:
    with RunLog(tmp_path, 4, None) as log:
        log.step(1, {"loss": 0.5, "chosen_error": 0.1})
    path = tmp_path / "log.jsonl"
    before = read_log(path)
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert read_log(path) == before
    with RunLog(tmp_path, 4, None, start_step=1):
        pass
    assert [entry for entry in read_log(path) if entry["event"] == "step"] == [before[1]]
