"""The README says what the results files say, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.readme import PAGES, README, render
from mapo_fast.engine.objectives import build_loss
from mapo_fast.settings.schema import ObjectiveConfig
from mapo_kernels.objectives import objective_names

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_made_from_the_results(page: Path) -> None:
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


def test_the_table_of_objectives_is_that_of_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| (yes|no) \| ?([^|]*?) ?\|$", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    found = {}
    for name in objective_names():
        config = ObjectiveConfig(name=name)
        loss: Any = build_loss(config, 1000)
        known = {key: setting.default for key, setting in config.known.settings.items()} | loss._settings
        settings = ", ".join(f"{key} {known[key]:g}" for key in config.takes)
        found[name] = ("yes" if config.known.reference else "no", settings)
    assert {name: (reference, settings) for name, reference, settings in rows} == found
