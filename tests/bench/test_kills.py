"""The campaign of kills: it finds what a careless writer leaves, and nothing where writing is atomic."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.kills import campaign
from mapo_fast.util.files import atomic_path

pytestmark = [
    pytest.mark.forks,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def _write(path: Path) -> None:
    with path.open("w") as file:
        file.write("one ")
        file.flush()
        time.sleep(0.01)
        file.write("two")


def _atomically(path: Path) -> None:
    with atomic_path(path) as temporary:
        _write(temporary)


@pytest.mark.slow
@pytest.mark.parametrize(("write", "right"), [(_write, False), (_atomically, True)])
def test_only_half_written_files_are_found(
    tmp_path: Path, write: Callable[[Path], None], right: bool
) -> None:
    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in "abc":
            if not (folder / name).exists():
                write(folder / name)

    def contents(folder: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}

    expected = dict.fromkeys("abc", "one two")
    found = campaign(work, contents, expected, 4, tmp_path, random.Random(0))
    assert found["kills"] >= 4
    assert (found["identical"] == found["runs"]) is right
    assert bool(found["differing"]) is not right


@pytest.mark.slow
def test_a_process_that_fails_by_itself_is_an_error(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        if folder.name == "run":
            raise ValueError

    with pytest.raises(RuntimeError, match="failed by itself"):
        campaign(work, lambda folder: {}, {}, 1, tmp_path, random.Random(1))
