"""What reaches the terminal: text as it is, on one line, whatever stands in the names within it.

What does not reach it ends no run: a full disk behind `> train.log`, a `| tee` that has ended, a terminal
that was closed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, cast

from mapo_fast.util.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str, style: str | None = None, *, wrap: bool = False) -> None:
    """Print one line; with `wrap` it is broken between words on a terminal.

    Names of files, columns, splits and prompts come from outside. Nothing in them is taken for markup, and
    nothing that a terminal acts on reaches it (`printable`).
    """
    soft = not (wrap and console.is_terminal)
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=soft)


def encode_anything() -> None:
    """Let standard output and error write what their encoding lacks as Python escapes.

    A pipe or a file has the encoding of the locale (on Windows often cp1252): one character that it does not
    have, in a path or a prompt, would end the run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks replace them
            stream.reconfigure(errors="backslashreplace")


class _Unfailing:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, with Python escapes for what the encoding lacks."""
        with suppress(OSError, ValueError):  # the latter of a stream that is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._stream.write(escaped)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def output_may_fail() -> None:
    """From here on this process goes on, and ends as it would have, when nobody takes its output.

    For commands whose work is not what they print.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:  # None without a console on Windows
            setattr(sys, name, _Unfailing(stream))


@contextmanager
def unfailing(console: Console | None) -> Iterator[None]:
    """Let a console drop what it cannot write; without, rich ends the process where a pipe has ended."""
    if console is None:
        yield
        return
    file = console.file
    console.file = cast("IO[str]", _Unfailing(file))
    try:
        yield
    finally:
        console.file = file
