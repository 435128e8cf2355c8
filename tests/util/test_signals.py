"""What stops a command: the first signal is a request where something is to be finished, the second ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mapo_fast import cli
from mapo_fast.run.folder import FitResult
from mapo_fast.util.signals import CAUGHT, STOP_FILE, Interrupted, StopNow, StopRequest, interruptible


@pytest.fixture(autouse=True)
def _as_on_a_terminal() -> Iterator[None]:
    """SIGHUP as a terminal sends it: the tests themselves may run under nohup."""
    before = {number: signal.getsignal(number) for number in CAUGHT}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", CAUGHT, ids=lambda number: number.name)
def test_the_first_signal_is_a_request_and_the_second_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert (stop.requested, stop.number) == (True, number)
        with pytest.raises(Interrupted) as second:
            signal.raise_signal(signal.SIGTERM)
        assert second.value.number == signal.SIGTERM
    assert signal.getsignal(number) is before


def test_a_file_in_the_folder_is_a_request_once(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        assert not stop.requested
        (tmp_path / STOP_FILE).touch()
        assert stop.requested
        assert stop.requested
        with pytest.raises(StopNow):
            stop.poll()
    assert (stop.number, [*tmp_path.iterdir()]) == (0, [])
    assert not StopRequest(tmp_path).requested


@pytest.mark.parametrize("number", CAUGHT, ids=lambda number: number.name)
def test_what_has_nothing_to_finish_ends_at_the_first(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as first, interruptible():
        signal.raise_signal(number)
    assert first.value.number == number


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- The commands ---

TABLE = """
[model]
path = "m"
[data]
cache = "c"
[train]
output = "o"
[adapter]
kind = "lora"
[optim]
lr = 1e-4
"""


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> tuple[Any, str]:
    """Exit code and standard error."""
    (tmp_path / "c.toml").write_text(TABLE, encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["mapo-fast", command, *([str(tmp_path / "c.toml")] * (command != "demo"))]
    )
    for check in ("check_prepare", "check_train"):  # the config names no files that there are
        monkeypatch.setattr(f"mapo_fast.run.ahead.{check}", lambda *args, **kwargs: False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command wraps them
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


STOPS = [
    (FitResult(Path("o"), 7, False, 0, 7, signal.SIGTERM), 143, "stopped at step 7, saved; continue"),
    (FitResult(Path("o"), 7, False, 0, 7, signal.SIGINT), 130, "stopped at step 7, saved; continue"),
    (
        FitResult(Path("o"), 0, False, 0, None, signal.SIGTERM),
        143,
        "stopped before the first step; continue",
    ),
]


@pytest.mark.parametrize(("result", "code", "said"), STOPS)
def test_a_stopped_run_says_what_is_saved(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    result: FitResult,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr("mapo_fast.run.train.fit", lambda *args, **kwargs: result)
    found, err = run(monkeypatch, capsys, tmp_path, "train")
    assert found == code
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "place", "said"),
    [
        ("prepare", "mapo_fast.data.prepare.prepare", "interrupted; what is encoded is kept"),
        ("train", "mapo_fast.run.train.fit", "interrupted"),
        ("demo", "mapo_fast.demo.run.run_demo", "interrupted"),
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_every_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    place: str,
    said: str,
    number: int,
    code: int,
) -> None:
    monkeypatch.setattr(place, lambda *args, **kwargs: signal.raise_signal(number))
    found, err = run(monkeypatch, capsys, tmp_path, command)
    assert found == code
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_a_demo_whose_training_was_stopped_ends_with_its_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mapo_fast.demo import run as demo

    stopped = FitResult(tmp_path, 7, False, 0, 7, signal.SIGTERM)
    monkeypatch.setattr(demo, "fit", lambda *args, **kwargs: stopped)
    table: Any = type("Config", (), {"train": type("Train", (), {"output": tmp_path})})
    with pytest.raises(Interrupted, match="keeps what was trained") as end:
        demo._train(table, None)  # type: ignore[arg-type]
    assert end.value.number == signal.SIGTERM
