"""Many cases of one kind; each follows from (seed, kind, number), so that one can be made again alone."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz.judge import FoundError
from tests.fuzz.kinds import Kind

SEED = 11
SLOW = 20.0
"""Seconds after which a case counts as one that hangs."""


class Report(NamedTuple):
    """What came of a campaign."""

    ended: Counter[str]
    found: dict[int, str]
    """By number of the case; cases with the same first line once."""
    seconds: float


class HangError(BaseException):
    """Not an `Exception`: nothing under test may take it for one of its own."""


def campaign(kind: Kind, numbers: Iterable[int], seed: int = SEED, *, alarm: bool = False) -> Report:
    """Run cases.

    Args:
        numbers: of the cases.
        alarm: end a case that hangs; by a signal, which pytest needs for itself.
    """
    began, ended, found, said = time.process_time(), Counter[str](), {}, set()
    for number in numbers:
        random = Random(f"{seed}/{kind.name}/{number}")
        started = time.monotonic()
        try:
            with _alarm(alarm), silence() as printed:
                result = kind.case(random)
            if time.monotonic() - started > SLOW:
                raise FoundError("it took too long")
            if printed:
                raise FoundError(f"printed {printed[0][:300]!r}")
            ended[result] += 1
        except (FoundError, HangError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            ended["found"] += 1
            if first[:80] not in said:
                said.add(first[:80])
                found[number] = str(error) or "it hangs"
    return Report(ended, found, time.process_time() - began)


@contextmanager
def _alarm(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return

    def ring(*_: Any) -> None:
        raise HangError(f"it hangs: no answer in {SLOW:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def silence() -> Iterator[list[str]]:
    """Take what is written to the process's standard error, by libraries too; in the list afterwards."""
    sys.stderr.flush()
    kept, printed = os.dup(2), list[str]()
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield printed
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            printed += filter(None, [file.read()])


def make(kind: type[Kind], folder: Path, model: Path) -> Kind:
    """The kind with a folder of its own."""
    own = folder / kind.name
    own.mkdir(parents=True)
    return kind(own, model)
