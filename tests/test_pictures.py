"""The pictures of pages in the docs, made from a run of the demo: `make proof` makes them anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from mapo_fast.cli import app
from mapo_fast.demo import world
from mapo_fast.demo.run import TINY_SDXL, DemoSize, run_demo
from mapo_fast.studio.project import Project
from tests.browser import opened
from tests.score.test_page import RULE
from tests.studio.test_pages import browser, served, wait_for_votes

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"
HEIGHT = 1000


def keep(page: Any, name: str) -> None:
    """Write the upper part of a page, in 256 colours."""
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        top = image.convert("RGB").crop((0, 0, image.width, min(image.height, HEIGHT)))
        top.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@pytest.mark.slow
@pytest.mark.proof
def test_pages_of_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_demo(tmp_path / "demo", console=Console(quiet=True), size=DemoSize(samples=12))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "demo_rule_scorer.py").write_text(RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    prompts = sorted({prompt for prompt, _, _ in world.preference_pairs(288, seed=0)})
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    how = ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "2", "--size", "32x32", "--steps", "12"]
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    scorer = ["--score", "demo_rule", "--allow-code", "demo_rule_scorer:register"]
    blind = ["--blind", str(tmp_path / "blind.html"), "--votes", "20"]
    for words in (
        ["report", str(tmp_path / "demo" / "mapo"), "--out", str(tmp_path / "report.html")],
        ["sample", str(TINY_SDXL), "--out", before, *how],
        ["sample", str(tmp_path / "demo" / "mapo"), "--out", after, *how],
        ["evaluate", before, after, *scorer, *blind, "--out", str(tmp_path / "out")],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    for name in ("report", "blind", "out/evaluation"):
        with opened(tmp_path / f"{name}.html", 1000) as page:
            keep(page, Path(name).name)


@pytest.mark.slow
@pytest.mark.proof
def test_pages_of_the_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "drawings"
    for number, (caption, *drawings) in enumerate(world.preference_pairs(40, seed=0)):
        for drawing in drawings:
            path = folder / f"{number:02d}-{drawing.colour}.png"
            path.parent.mkdir(exist_ok=True)
            drawing.image().resize((512, 512), Image.Resampling.LANCZOS).save(path)
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    with Project.open(folder) as project, served(project) as address, browser(1000, []) as page:
        page.goto(address)
        page.wait_for_selector("#groups h3")
        page.wait_for_load_state("networkidle")
        keep(page, "studio-pictures")
        page.click("nav a[href='#vote']")
        wait_for_votes(page, 0)
        for number in range(12):
            page.keyboard.press("ArrowLeft")
            wait_for_votes(page, number + 1)
        page.wait_for_load_state("networkidle")
        keep(page, "studio-vote")


def test_the_docs_show_every_picture() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    shown = set(re.findall(r"\(pictures/([\w-]+\.png)\)", text))
    assert shown == {path.name for path in PICTURES.glob("*.png")}
    assert sum(path.stat().st_size for path in PICTURES.glob("*.png")) < 2**20
