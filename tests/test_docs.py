"""The pages of `docs/` name what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_packaging import ROOMS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", PAGE)


def defined(file: Path) -> set[str]:
    """Classes, functions and, with their class, methods."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "names"), NAMED, ids=lambda text: text.replace("`", ""))
def test_the_architecture_names_what_there_is(file: str, names: str) -> None:
    assert {*re.findall(r"`([\w.]+)`", names)} <= defined(ROOT / "mapo_fast" / file)


def test_the_architecture_names_files_and_rooms_that_there_are() -> None:
    files = {*re.findall(r"`([\w/]+\.py)`", PAGE)}
    assert len(NAMED) > 20
    for file in files:
        assert (ROOT / "mapo_fast" / file).is_file() or (ROOT / file).is_file(), file
    assert re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE) == [*ROOMS]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
