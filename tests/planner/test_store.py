"""Traces on disk: a cache, so whatever is wrong with a file of it, the trace is made again."""

from __future__ import annotations

import io
import lzma
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from mapo_fast.planner import shipped_traces, store, trace_file
from mapo_fast.planner.trace import Trace, record_step
from mapo_fast.settings.optimizers import OPTIMIZERS
from tests.pages import imported
from tests.planner.test_recorder import REDUCED, settings


def _trace() -> Trace:
    fields: dict[str, Any] = dict.fromkeys(Trace._fields, 1)
    return Trace(**fields | {name: np.arange(3) for name in trace_file._ARRAYS} | {"marks": []})


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    store._write(tmp_path / "a.xz", _trace())
    read = store._read(tmp_path / "a.xz")
    assert read is not None
    for name, value in _trace()._asdict().items():
        assert np.array_equal(getattr(read, name), value), name


@pytest.mark.slow
def test_damage_anywhere_in_a_trace_is_seen(tmp_path: Path) -> None:
    store._write(tmp_path / "a.xz", _trace())
    whole = (tmp_path / "a.xz").read_bytes()
    path = tmp_path / "b.xz"
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        assert store._read(path) is None, place
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        read = store._read(path)  # flags and times of the archive may differ, numbers may not
        assert read is None or all(np.array_equal(a, b) for a, b in zip(read, _trace(), strict=True)), place


@pytest.mark.parametrize("rest", ["[" * 100_000, "[]", "{}", '{"marks": [1]}', '{"marks": 1}', "9" * 5000])
def test_other_contents_are_no_trace(rest: str) -> None:
    arrays: dict[str, Any] = {name: np.arange(3) for name in trace_file._ARRAYS}
    file = io.BytesIO()
    np.savez(file, rest=rest, **arrays)
    assert trace_file.unpack(lzma.compress(file.getvalue())) is None
    assert trace_file.unpack(file.getvalue()) is None
    assert trace_file.unpack(b"") is None


def test_events_are_stored_by_their_age() -> None:
    events = np.array([0, 1, ~0, 2, ~2, 3, ~1, ~3])
    ages = trace_file._ages(events)
    assert ages.tolist() == [0, 0, 2, 0, 1, 0, 3, 1]
    assert trace_file._events(ages).tolist() == events.tolist()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            {"objective": {"name": "mapo"}},
            {
                "objective": {"name": "mapo", "beta": 0.3, "snr": 0.2},
                "adapter": {"alpha": 3.0},
                "optim": {
                    "lr": 1e-3, "betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.5, "max_grad_norm": 3.0,
                    "schedule": "cosine", "warmup_steps": 3,
                },
            },
        ),
        (
            {"objective": {"name": "mapo", "form": "paper", "beta": 8.0}},
            {"objective": {"name": "mapo", "form": "paper", "beta": 9.0, "reading": "scale"}},
        ),
        (
            {"objective": {"name": "kto"}, "optim": {"max_update_rms": 1.0, "weight_decay": 0.0}},
            {
                "objective": {"name": "kto", "beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 3.0},
                "optim": {"max_update_rms": 2.0, "weight_decay": 0.0},
            },
        ),
    ],
    ids=["mapo", "paper", "kto"],
)  # fmt: skip
def test_numbers_that_no_trace_is_named_by_change_none(before: Any, after: Any) -> None:
    packed = set()
    for sections in (before, after):
        config = settings(**sections)
        trace = record_step(config, REDUCED)
        packed.add((shipped_traces.name(config, REDUCED, True), trace_file.pack(trace)))
    assert len(packed) == 1


def test_what_changes_operations_names_another_trace() -> None:
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"optim": {"max_grad_norm": 0.0}},
        {"optim": {"weight_decay": 0.0}},
        {"optim": {"max_update_rms": 1.0}},
        {"objective": {"name": "dpo"}},
        {"adapter": {"rank": 8}},
        {"train": {"accumulation": 2}},
        {"data": {"resolution": 512}},
    )
    names = {shipped_traces.name(settings(**one), {}, True) for one in changes}
    assert len(names) == len(changes)
    many = settings(train={"accumulation": 64})
    assert shipped_traces.name(many, {}, True) in names


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_what_is_no_file_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.xz")
    (tmp_path / "b.xz").symlink_to("b.xz")
    for path in (tmp_path, tmp_path / "a.xz", tmp_path / "b.xz", tmp_path / "none.xz"):
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
