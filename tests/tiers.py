"""The two tiers of tests: what `make test-fast` runs, and the rest, which is marked `slow`.

A test that is not marked may start no process and train no whole run: it fails where it does, whatever time
that takes. So the fast tier stays fast on any machine, and no clock decides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import pytest

PROCESSES = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
"""Python's audit events; multiprocessing's `spawn` raises none."""

_SEEN = pytest.StashKey[set[str]]()
_watching: list[set[str]] = []


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
