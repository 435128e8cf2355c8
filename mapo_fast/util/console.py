"""Output to the terminal: each text on one line and unchanged, whatever characters file names in it have.

Output that cannot be written does not end a run: `> train.log` on a full disk, a `| tee` that has ended, a
closed terminal.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, cast

from mapo_fast.util.errors import printable
from mapo_fast.util.progress import TRAINING, Callbacks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def say(console: Console, text: str, style: str | None = None, *, wrap: bool = False) -> None:
    """Print one line; with `wrap` it is broken between words on a terminal.

    Names of files, columns, splits and prompts come from outside. Nothing in them is taken for markup, and
    control characters are escaped (`printable`).
    """
    soft = not (wrap and console.is_terminal)
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=soft)


def encode_anything() -> None:
    """Let standard output and error write characters that their encoding lacks as Python escapes.

    A pipe or a file has the encoding of the locale (on Windows often cp1252): one character that it does not
    have, in a path or a prompt, would end the run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks replace them
            stream.reconfigure(errors="backslashreplace")


def command_line(words: Sequence[str]) -> str:
    """A command as one would type it on this system, with quotes where a word needs them."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


class _Unfailing:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, with Python escapes for characters that the encoding lacks."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._stream.write(escaped)
        return len(text)

    def flush(self) -> None:
        """Flush, ignoring errors."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def output_may_fail() -> None:
    """Let this process go on, and end normally, when its output can no longer be written.

    For commands whose result is not their output.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:  # None without a console on Windows
            setattr(sys, name, _Unfailing(stream))


def unfailing(console: Console) -> Console:
    """Let a console drop output that it cannot write; otherwise rich ends the process after a broken pipe."""
    if not isinstance(console.file, _Unfailing):
        console.file = cast("IO[str]", _Unfailing(console.file))
    return console


_LINE = {
    "loss": "loss {:.4f}",
    "chosen_error": "chosen error {:.4f}",
    "rejected_error": "rejected error {:.4f}",
    "margin": "margin {:+.4f}",
    "saturation": "saturation {:.0%}",
    "accuracy": "accuracy {:.0%}",
    "grad_norm": "grad norm {:.2f}",
    "lr": "lr {:.1e}",
    "pairs_per_s": "{:.2f} pairs/s",
    "peak_memory_mib": "peak memory {:,.0f} MiB",
    "skipped_steps": "skipped steps {:.0f}",
    "compile_s": "compile {:.0f} s",
}
"""The figures of the console's line, in order, under their names in `log.jsonl` and TensorBoard."""


class Terminal(Callbacks):
    """Callbacks that print lines and progress bars."""

    def __init__(self, console: Console | None = None) -> None:
        """`console` is where to print, standard output by default; from here on it is `unfailing`."""
        from rich.console import Console

        self.console = unfailing(console or Console())
        self._bar: Progress | None = None
        self._began, self._first_step = 0.0, 0

    def message(self, text: str) -> None:
        """Print one line."""
        say(self.console, text)

    def warning(self, text: str, step: int | None = None) -> None:
        """Print a yellow line."""
        where = "" if step is None else f" at step {step}"
        say(self.console, f"warning{where}: {text}", "yellow", wrap=True)

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Show a progress bar; for the training on a terminal only."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name, bar, count, left = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )  # fmt: skip
        if stage != TRAINING:
            self._bar = Progress(name, bar, count, left, console=self.console)
        else:
            self._began, self._first_step = time.monotonic(), done
            if not self.console.is_terminal:
                return
            speed = TextColumn("{task.fields[speed]}")
            self._bar = Progress(
                name, bar, count, speed, TextColumn("ETA"), left,
                console=self.console, speed_estimate_period=120, refresh_per_second=2,
            )  # fmt: skip
        self._task = self._bar.add_task(stage, total=total, completed=done, speed="")
        self._bar.start()

    def advance(self, stage: str, done: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def end(self, stage: str) -> None:
        """Leave the progress bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, step: int, total: int, figures: Mapping[str, float]) -> None:
        """Print the figures of training steps in one line."""
        if self._bar is not None and "pairs_per_s" in figures:
            self._bar.update(self._task, speed=f"{figures['pairs_per_s']:.2f} pairs/s")
        shown = {name: form for name, form in _LINE.items() if name in figures}
        if not figures.get("skipped_steps"):
            shown.pop("skipped_steps", None)
        parts = [form.format(figures[name]) for name, form in shown.items()]
        say(self.console, f"step {step}/{total}  " + "  ".join(parts) + self._eta(step, total), wrap=True)

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Print the figures of a held-out evaluation in one line."""
        parts = []
        if "accuracy" in figures:
            parts.append(f"accuracy {figures['accuracy']:.3f}")
        names = ["accuracy", "margin", "chosen_error"]
        if "accuracy" not in figures:
            names.append("rejected_error")  # single images have no margin that would show it
        for name in names:
            if change := figures.get(f"{name}_change"):
                parts.append(f"{name.replace('_', ' ')} change {_change(change)}")
        if "drift" in figures:
            parts.append(f"drift {figures['drift']:.2g}")
        say(self.console, f"held-out at step {step}: " + "; ".join(parts), wrap=True)
        if averaged := figures.get("ema"):
            changes = {name: averaged.get(f"{name}_change") for name in names}
            parts = [
                f"{name.replace('_', ' ')} change {_change(one)}" for name, one in changes.items() if one
            ]
            say(self.console, "  the average of the weights: " + "; ".join(parts), wrap=True)
        if step and (bins := figures.get("bins")):
            parts = [f"{level} {_by_noise(one)}" for level, one in bins.items()]
            say(self.console, "  by noise level: " + "; ".join(parts), "dim", wrap=True)

    def _eta(self, step: int, total: int) -> str:
        done = step - self._first_step
        if self._bar is not None or done <= 0:
            return ""
        left = (time.monotonic() - self._began) / done * (total - step)
        return f"  ETA {timedelta(seconds=round(left))}"


def _by_noise(figures: Mapping[str, Any]) -> str:
    """The changes at one noise level, without intervals."""
    names = {"margin_change": "margin", "chosen_error_change": "chosen error"}
    return ", ".join(f"{said} {figures[key]['mean']:+.4f}" for key, said in names.items() if key in figures)


def _change(change: Mapping[str, float | None]) -> str:
    mean, low, high = change["mean"], change["low"], change["high"]
    if low is None or high is None:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
