"""README and docs say what the results files and the registry say, and their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.readme import PAGES, render
from mapo_kernels.objectives import OBJECTIVES, objective_key, objective_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_tables_are_up_to_date(page: Path) -> None:
    assert render(page) == page.read_text(encoding="utf-8")


def test_one_page() -> None:
    assert len(README.splitlines()) <= 150


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert used
    assert used <= targets


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_objectives_are_those_that_there_are() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (yes|no) \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [*objective_names()]
    for name, reference in rows:
        assert (reference == "yes") == OBJECTIVES[objective_key(name, form="code")].reference, name
