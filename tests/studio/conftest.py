"""Projects of tiny pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mapo_fast.studio.project import Project
from tests.studio.pictures import painted

Opener = Callable[[], Project]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    folder = tmp_path / "user-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("LOCALAPPDATA", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of 30 prompts with four pictures each."""
    path = tmp_path / "project"
    for prompt in range(30):
        for number in range(4):
            painted(path / f"{prompt:02d}-{number}.png", prompt * 4 + number, prompt=f"prompt {prompt}")
    return path


@pytest.fixture
def opened(folder: Path) -> Iterator[Opener]:
    """Opens the project and scans it; closes the one before."""
    with ExitStack() as stack:

        def open_project() -> Project:
            stack.close()
            project = stack.enter_context(Project.open(folder))
            list(project.scan())
            return project

        yield open_project
