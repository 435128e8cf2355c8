"""The READMEs say what the results files and the registry say, and their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.readme import PAGES, README, render

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_up_to_date(page: Path) -> None:
    assert render(page) == page.read_text(encoding="utf-8")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert used
    assert used <= targets


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
