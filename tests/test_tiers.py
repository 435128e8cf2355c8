"""The tiers: what a fast test may not do is seen, however it is done."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable

import pytest

from mapo_fast.run.trainer import Trainer
from tests.tiers import watched


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
