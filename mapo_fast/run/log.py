"""One log for a run: a JSON-lines file, TensorBoard, and the caller's callbacks.

`<folder>/log.jsonl` has one object per line, flushed at once: `event`, `step`, `time` (Unix seconds) and the
event's own fields. Non-finite numbers are written as the strings "nan", "inf" and "-inf", so that every line
is strict JSON.

    start        the beginning of a session; `step` is where it starts from, `run` the run's id
    step         loss, chosen_error, rejected_error (for single images: of wanted and unwanted ones), margin
                 (mean e_l − e_w; not for single images), logits (mean z), saturation
                 (mean σ(z), near 1 for learnt pairs), saturated (share of pairs with σ(−z) < 0.05), accuracy
                (share of pairs with z > 0; with a reference model: pairs whose chosen image has improved
                 more), grad_norm, lr, pairs_per_s, peak_memory_mib, skipped_steps; compile_s, what
                 speed.compile took so far
    evaluation   held-out figures, each against the start model
    warning      message
    end          whether the run is finished, and the session's seconds

A resumed run drops the lines of steps after its checkpoint (they will be made again) and a last line that a
kill cut short, so no step is there twice. It warns about damaged lines, and about a log that is missing or
another run's. `<folder>/tensorboard` gets the same numbers, purged in the same way.

A line that cannot be written is an error: the run has no other record. TensorBoard and Weights & Biases are
copies of the log: a copy that fails is left out from then on, with a warning.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mapo_fast import __version__
from mapo_fast.run.mirrors import TensorBoard, open_wandb
from mapo_fast.run.monitor import Monitor
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, open_regular, os_error, parse_json
from mapo_fast.util.progress import TRAINING, Callbacks

LOG_FILE = "log.jsonl"

_NON_FINITE = ("nan", "inf", "-inf")


class RunLog:
    """The log of one run, and its `Monitor`; a context manager."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        callbacks: Callbacks | None,
        *,
        start_step: int = 0,
        wandb: str | None = None,
        run: str = "",
        earlier: Callable[[], str] = lambda: "take an earlier checkpoint",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log.

        Args:
            folder: the run's output folder.
            total_steps: optimizer steps of the whole run.
            callbacks: called with the stage "training", its figures and warnings.
            start_step: steps done by the checkpoint the run resumes from. At 0 the log starts empty.
                Otherwise the lines up to that step stay, and the monitor sees them again, so that a resumed
                run warns like an uninterrupted one.
            wandb: Weights & Biases project that mirrors TensorBoard; None for none.
            run: id of the run. Another run's log under this name is moved aside, with a warning.
            earlier: gives the text on how to take an earlier checkpoint, for the monitor's warnings.
            facts: more for the entry `start` (`facts.py`).

        Raises:
            UserError: disk full or not writable, or wandb is asked for and not installed or does not start.
        """
        self._wandb = open_wandb(wandb, folder) if wandb is not None else None
        self._callbacks = callbacks or Callbacks()
        self._total = total_steps
        self._first_step = start_step
        self._began = time.monotonic()
        path = folder / LOG_FILE
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            kept, lost = _cut(path, start_step, run)
            # Unbuffered, so that closing the file does not retry a failed write.
            self._file: BinaryIO = path.open("ab", buffering=0)
        self._path = path
        self._last_step = start_step
        evaluated = [int(e["step"]) for e in kept if e["event"] == "evaluation"]
        self.evaluated = max(evaluated, default=-1)
        """The newest step that has been evaluated; −1 for none."""
        self._training = False
        self._monitor = Monitor(self._warn, earlier)
        self._replaying = True
        for entry in kept:
            if entry["event"] == "step":
                self._monitor.step(entry["step"], entry)
            elif entry["event"] == "evaluation":
                self._monitor.evaluation(entry["step"], entry)
        self._replaying = False
        known = {"run": run, "total_steps": total_steps, "version": __version__}
        self._write("start", start_step, {**known, **(facts or {})})
        self._board = self._open_tensorboard(folder / "tensorboard")
        if lost:
            self.warning(start_step, lost)
        self._callbacks.begin(TRAINING, total_steps, start_step)
        self._training = True

    def advance(self, step: int) -> None:
        """Report the step that is done; cheap enough for every step, nothing is read from the device."""
        self._callbacks.advance(TRAINING, step)

    def step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Log one interval's training figures; those that are None are left out."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        self._write("step", step, known)
        self._scalars("train", step, known)
        self.advance(step)
        self._callbacks.step(step, self._total, known)
        self._monitor.step(step, known)

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Log a held-out evaluation: the (nested) dict of `evaluate.compare`."""
        self._write("evaluation", step, figures)
        self.evaluated = step
        self._scalars("held_out", step, figures, flush=True)
        self._callbacks.evaluation(step, figures)
        self._monitor.evaluation(step, figures)

    def images(self, step: int, paths: Sequence[Path]) -> None:
        """Show previews in TensorBoard, each under its file's name."""
        if (board := self._board) is None:
            return
        with self._mirror("TensorBoard"):
            board.add_images([(f"previews/{path.stem}", path) for path in paths], step)

    def warning(self, step: int, message: str) -> None:
        """Report a warning and log it."""
        self._callbacks.warning(message, step)
        self._write("warning", step, {"message": message})

    def end(self, step: int, *, finished: bool) -> None:
        """Log the end of this session: the run is finished, or was stopped to be resumed.

        Everything else is written by then, so a full disk only gives a warning.
        """
        seconds = round(time.monotonic() - self._began, 3)
        try:
            self._write("end", step, {"finished": finished, "seconds": seconds})
        except UserError as error:
            self._callbacks.warning(f"the log lacks its last line: {error}")

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self._training:
            self._training = False
            self._callbacks.end(TRAINING)
        board, self._board = self._board, None
        if board is not None:
            with self._mirror("TensorBoard"):
                board.close()
        wandb, self._wandb = self._wandb, None
        if wandb is not None:
            with self._mirror("Weights & Biases"):
                wandb.finish()
        with suppress(OSError):  # nothing is buffered
            self._file.close()

    def __enter__(self) -> RunLog:
        """Return the log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log."""
        self.close()

    def _warn(self, step: int, message: str) -> None:
        if not self._replaying:
            self.warning(step, message)

    def _write(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        self._last_step = step
        line = {"event": event, "step": step, "time": round(time.time(), 3), **fields}
        data = (json.dumps(_quoted(line), allow_nan=False) + "\n").encode()
        with disk_errors(self._path):
            while data:  # a disk that is nearly full takes a part
                data = data[self._file.write(data) :]

    def _scalars(self, group: str, step: int, figures: Mapping[str, Any], *, flush: bool = False) -> None:
        if (board := self._board) is None:
            return
        with self._mirror("TensorBoard"):
            try:
                board.add(_numbers(group, figures), step, flush=flush)
            except Exception:
                self._board = None
                with suppress(Exception):
                    board.close()
                raise

    @contextmanager
    def _mirror(self, name: str) -> Iterator[None]:
        """Turn any exception of a mirror's library into a warning, and leave the mirror out from then on."""
        try:
            yield
        except Exception as error:
            with suppress(UserError):  # the log may have failed too, which is reported elsewhere
                message = f"{name} failed and is left out from here: {type(error).__name__}: {error}"
                self.warning(self._last_step, message)

    def _open_tensorboard(self, folder: Path) -> TensorBoard | None:
        """Open TensorBoard; None with one warning where it is missing or fails."""
        with self._mirror("TensorBoard"):
            try:
                return TensorBoard(folder, self._first_step)
            except ImportError:
                self.warning(
                    self._first_step,
                    f"tensorboard is not installed, so figures go to {self._path.name} only "
                    "(pip install tensorboard)",
                )
        return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `log.jsonl`, in order, with their non-finite numbers as floats again.

    Damaged lines, and a line that a kill cut short, are left out.

    Raises:
        UserError: the log cannot be read.
    """
    try:
        return [entry for _, entry in _lines(path)]
    except OSError as error:
        raise os_error(error, f"read {path}") from None


def _cut(path: Path, step: int, run: str) -> tuple[list[dict[str, Any]], str]:
    """Drop the lines after `step` (all of them for step 0), atomically.

    Returns:
        The entries that are kept, and a warning about missing ones, empty if there are none.
    """
    if not path.exists():
        return [], f"{path} is missing: there are no figures up to step {step}" if step else ""
    damaged: list[str] = []
    kept = [(text, entry) for text, entry in _lines(path, damaged) if 0 < step >= entry["step"]]
    runs = [entry.get("run") for _, entry in kept if entry["event"] == "start"]
    if run not in runs and any(isinstance(one, str) for one in runs):  # earlier versions have no run id
        aside = path.with_name(f"of-another-run-{path.name}")
        path.replace(aside)
        return [], f"{path} was another run's and is now {aside.name}: there are no figures up to step {step}"
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{text}\n" for text, _ in kept), encoding="utf-8", newline="\n")
    lost = f"{path} had {len(damaged)} damaged line(s), which are left out" if damaged and step else ""
    return [entry for _, entry in kept], lost


def _lines(path: Path, damaged: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Text and entry of each line of a log; `damaged` takes the other whole lines."""
    with open_regular(path) as file:
        for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            try:
                entry = _unquoted(parse_json(text))
            except (ValueError, RecursionError):
                entry = None
            if _is_entry(entry):
                yield text, entry
            elif damaged is not None and line.endswith(b"\n"):  # else a kill cut it short
                damaged.append(text)


def _is_entry(entry: Any) -> bool:
    """Whether an object is a log entry: an event at a step, with numbers for the monitor's figures."""
    if not (isinstance(entry, dict) and isinstance(entry.get("event"), str)):
        return False
    if type(step := entry.get("step")) is not int or not 0 <= step <= _LARGEST:
        return False
    if entry["event"] not in ("step", "evaluation"):
        return True
    figures = (
        entry[name] for name in ("skipped_steps", "chosen_error", "saturated", "drift") if name in entry
    )
    change = entry.get("chosen_error_change", {"mean": 0.0, "low": None, "high": None})
    return all(map(_is_figure, figures)) and (
        isinstance(change, dict)
        and change.keys() >= {"mean", "low", "high"}
        and _is_figure(change["mean"])
        and all(change[name] is None or _is_figure(change[name]) for name in ("low", "high"))
    )


def _is_figure(value: Any) -> bool:
    return _is_number(value) and not _LARGEST < abs(value) < math.inf


_LONGEST_LINE = 2**20
_LARGEST = 10**300
"""Largest integer that counts as a figure; figures are floats."""


def _quoted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _unquoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unquoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    return float(value) if value in _NON_FINITE else value


def _numbers(prefix: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{name}", value)
        elif _is_number(value):
            yield f"{prefix}/{name}", float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
