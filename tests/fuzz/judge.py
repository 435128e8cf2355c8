"""What may come of any input: an answer, or one line that says what is wrong where; nothing changes."""

from __future__ import annotations

import hashlib
import stat
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mapo_fast.util.errors import UserError


class FoundError(AssertionError):
    """The program did something else."""


def judge(call: Callable[[], Any], names: Collection[str], unchanged: Path | None = None) -> str:
    """Call it, and return how it ended: "accepted" or "refused".

    Args:
        names: one of these stands in the line.
        unchanged: a folder in which nothing may be written.

    Raises:
        FoundError: it did not end in one of these two ways.
    """
    before = None if unchanged is None else state(unchanged)
    try:
        call()
        ended = "accepted"
    except UserError as error:
        ended = "refused"
        text = str(error)
        if not text or not text.isprintable() or len(text) > 2000:
            raise FoundError(f"not one line: {text[:300]!r} ({len(text)} characters)") from error
        if not any(name in text for name in names):
            raise FoundError(f"names none of {names}: {text}") from error
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        raise FoundError(f"{type(error).__name__}: {str(error)[:300]!r}\n{where}") from error
    if unchanged is not None and state(unchanged) != before:
        raise FoundError(f"{unchanged} was written to")
    return ended


def state(folder: Path) -> dict[str, str]:
    """Every name under a folder with what stands there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            what = f"link to {path.readlink()}"
        elif stat.S_ISREG(mode) and path.stat().st_size < 2**24:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = f"{mode} {path.lstat().st_size}"
        found[str(path.relative_to(folder))] = what
    return found
