"""Damaged input of every kind is an answer or one line; `python -m tests.fuzz` runs more of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.campaign import campaign, make
from tests.fuzz.kinds import KINDS, Kind

UNITS = float(os.environ.get("MAPO_FAST_FUZZ", "0.15"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the damage needs FIFOs and sockets in the file system")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_input_is_an_answer_or_one_line(kind: type[Kind], tmp_path: Path, tiny_sdxl: Path) -> None:
    numbers = range(int(UNITS * kind.weight))
    report = campaign(make(kind, tmp_path, tiny_sdxl), numbers)
    print(f"{kind.name}: {len(numbers)} cases, {dict(report.ended)}, {report.seconds:.1f} s")
    assert not report.found, "\n\n".join(f"case {number}: {text}" for number, text in report.found.items())
    assert report.ended.total() == len(numbers)
