"""Shared fixtures: one tiny SDXL pipeline per session, fixed seeds, one CPU thread."""

import gc
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny_sdxl

pytest_plugins = ["tests.tiers"]

torch.set_num_threads(1)
gc.disable()  # until all is imported: nothing of it is garbage, and looking takes a third of the time


def pytest_collection_finish() -> None:
    """What is imported stays, so no collection looks at it; and the tests' garbage is small."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    """Libraries in C++ complain about what is left when the process ends."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what forks this process, which has not grown yet; then the longest; `gpu` skips without one.

    The longest, so that no worker is left alone with one of them.
    """
    items.sort(
        key=lambda item: (not item.get_closest_marker("forks"), not item.get_closest_marker("timeout"))
    )
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for all that was skipped: how many, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        words = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"{len(skipped):,} skipped: {words}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline folder; tests must not write into it."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planner's cache of the tests: one of all processes of the run, as on a user's machine."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"


@pytest.fixture
def planned_here(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and with a cache of its own: for a tiny UNet two more processes only cost time."""
    from mapo_fast.planner import store  # the kernels' tests do without it

    monkeypatch.setattr(store, "folder", lambda: traces)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
