"""The tiers of tests: what `make test-fast` runs, the rest of `make test`, and what only `make proof` runs.

What is not of the first is marked `slow`, and what is of the third `proof`, or left out of a `grid`.

A test that is not marked may start no process and train no whole run: it fails where it does, whatever time
that takes. So the fast tier stays fast on any machine, and no clock decides.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import pytest

from tests.covering import covering

PROCESSES = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
"""Python's audit events; multiprocessing's `spawn` raises none."""

_SEEN = pytest.StashKey[set[str]]()
_watching: list[set[str]] = []


def some_of(rows: Iterable[Any], proof: Container[Any]) -> list[Any]:
    """The rows of a grid; those that are in `proof` run in `make proof` only."""
    return [_proof(row) if row in proof else row for row in rows]


def _proof(row: Any) -> Any:
    return pytest.param(*(row if type(row) is tuple else (row,)), marks=pytest.mark.proof)


def thin_out_grids(items: list[pytest.Item]) -> None:
    """Mark `proof` what is of a `grid` and not needed for every value of each of its parameters to stand.

    On a GPU all rows run.
    """
    grids: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid") and not item.get_closest_marker("gpu"):
            assert isinstance(item, pytest.Function)
            grids[item.nodeid.partition("[")[0]].append(item)
    for rows in grids.values():
        kept = covering([tuple(map(repr, item.callspec.params.values())) for item in rows], strength=1)
        for number in {*range(len(rows))} - {*kept}:
            rows[number].add_marker(pytest.mark.proof)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `proof`, unless `-m` names it or a test is named by itself."""
    thin_out_grids(items)
    if "proof" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = {item for item in items if item.get_closest_marker("proof")}
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _note(what: str) -> None:
    for seen in _watching:
        seen.add(what)


def _audit(event: str, _: tuple[Any, ...]) -> None:
    if event in PROCESSES:
        _note("starts a process")


sys.addaudithook(_audit)


def _noted(what: str, owner: type, name: str) -> Any:
    """A patch under which calls of a method are noted, and done."""
    method = getattr(owner, name)

    def noting(self: Any, *args: Any) -> Any:
        _note(what)
        return method(self, *args)

    return mock.patch.object(owner, name, noting)


@contextmanager
def watched() -> Iterator[set[str]]:
    """What only a slow test may do, as far as it is done in this context."""
    seen: set[str] = set()
    _watching.append(seen)
    with ExitStack() as stack:
        stack.callback(_watching.pop)
        stack.enter_context(_noted("starts a process", BaseProcess, "start"))
        if trainer := sys.modules.get("mapo_fast.run.trainer"):  # else nothing here trains
            stack.enter_context(_noted("trains a whole run", trainer.Trainer, "run"))
        yield seen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch a test with its fixtures."""
    with watched() as item.stash[_SEEN]:
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that is in the wrong tier."""
    result = yield
    if item.stash[_SEEN] and not item.get_closest_marker("slow"):
        pytest.fail(f"it {' and '.join(sorted(item.stash[_SEEN]))}: mark it `slow`", pytrace=False)
    return result
