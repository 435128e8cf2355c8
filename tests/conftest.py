"""Shared fixtures: one tiny SDXL pipeline per session, fixed seeds, one CPU thread."""

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_sdxl

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline folder; tests must not write into it."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")
