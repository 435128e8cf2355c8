"""Traces on disk: a cache, so whatever is wrong with a file of it, the trace is made again."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from mapo_fast.planner import store
from mapo_fast.planner.trace import Trace
from mapo_fast.settings.optimizers import OPTIMIZERS
from tests.pages import imported
from tests.planner.test_recorder import settings


def _trace() -> Trace:
    fields: dict[str, Any] = dict.fromkeys(Trace._fields, 1)
    return Trace(**fields | {name: np.arange(3) for name in store._ARRAYS} | {"marks": []})


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    store._write(tmp_path / "a.npz", _trace())
    read = store._read(tmp_path / "a.npz")
    assert read is not None
    for name, value in _trace()._asdict().items():
        assert np.array_equal(getattr(read, name), value), name


@pytest.mark.slow
def test_damage_anywhere_in_a_trace_is_seen(tmp_path: Path) -> None:
    store._write(tmp_path / "a.npz", _trace())
    whole = (tmp_path / "a.npz").read_bytes()
    path = tmp_path / "b.npz"
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        assert store._read(path) is None, place
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        read = store._read(path)  # flags and times of the archive may differ, numbers may not
        assert read is None or all(np.array_equal(a, b) for a, b in zip(read, _trace(), strict=True)), place


@pytest.mark.parametrize("rest", ["[" * 100_000, "[]", "{}", '{"marks": [1]}', '{"marks": 1}', "9" * 5000])
def test_other_contents_are_no_trace(tmp_path: Path, rest: str) -> None:
    arrays: dict[str, Any] = {name: np.arange(3) for name in store._ARRAYS}
    np.savez(tmp_path / "a.npz", rest=rest, **arrays)
    assert store._read(tmp_path / "a.npz") is None
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    assert store._read(tmp_path / "b.npz") is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_what_is_no_file_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    (tmp_path / "b.npz").symlink_to("b.npz")
    for path in (tmp_path, tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "none.npz"):
        assert store._read(path) is None


def test_a_trace_is_made_again_when_the_file_of_its_optimizer_changes(tmp_path: Path) -> None:
    with imported("optimizer", tmp_path) as module, patch.dict(OPTIMIZERS):
        module.register()
        ours, theirs = (settings(optim={"name": name}) for name in ("adamw", "lion"))
        before = [store.digest(config, {}, True) for config in (ours, theirs)]
        assert module.__file__ is not None
        with Path(module.__file__).open("a") as file:
            file.write("# another line\n")
        assert store.digest(ours, {}, True) == before[0]
        assert store.digest(theirs, {}, True) != before[1]
