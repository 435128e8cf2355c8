"""The pages of `docs/` name what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

import mapo_fast
import mapo_kernels
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


PAGES = sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_links_lead_to_pages(page: Path) -> None:
    """The strict build (`make docs`) refuses more; this is quicker."""
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        assert target.is_file(), link
        assert target.is_relative_to(ROOT / "docs"), f"{link}: name a file outside docs/ without a link"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_files_of_the_repository_exist(page: Path) -> None:
    named = r"`((?:bench|docs|examples|kernels|mapo_fast|recipes|tests)/[\w./-]+\.\w+)`"
    for file in re.findall(named, page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize(
    ("package", "page"),
    [(mapo_fast, "python-api.md"), (mapo_kernels, "kernels/api.md")],
    ids=lambda p: str(p),
)
def test_every_public_name_is_documented(package: ModuleType, page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    shown = [path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    assert sorted(shown) == sorted({*package.__all__} - {"__version__"})
    for name in shown:
        assert getattr(package, name).__doc__, name
