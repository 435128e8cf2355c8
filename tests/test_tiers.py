"""The tiers: what a fast test may not do is seen, however it is done."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest

from mapo_fast.run.trainer import Trainer
from tests.tiers import thin_out_grids, watched


def spawn() -> None:
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()


def train() -> None:
    with pytest.raises(AttributeError):
        Trainer.run(object(), None, None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: subprocess.run([sys.executable, "-S", "-c", ""], check=True), {"starts a process"}),
        (spawn, {"starts a process"}),
        (train, {"trains a whole run"}),
        (int, set()),
    ],
)
def test_what_a_fast_test_may_not_do_is_seen(call: Callable[[], object], seen: set[str]) -> None:
    with watched() as found:
        call()
    assert found == seen


def test_of_a_grid_rows_with_every_value_are_left() -> None:
    rows = []
    for a, b in itertools.product(range(4), range(3)):
        row = mock.Mock(spec=pytest.Function, nodeid=f"test_x.py::test_y[{a}-{b}]")
        row.callspec = SimpleNamespace(params={"a": a, "b": b})
        row.get_closest_marker = {"grid": pytest.mark.grid}.get
        rows.append(row)
    thin_out_grids(rows)
    left = [row.callspec.params for row in rows if not row.add_marker.called]
    assert len(left) == 4
    assert {row["a"] for row in left} == {*range(4)}
    assert {row["b"] for row in left} == {*range(3)}
