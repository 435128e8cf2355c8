"""What reaches the terminal: text as it is, on one line, whatever stands in the names within it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mapo_fast.errors import printable

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
