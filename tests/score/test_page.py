"""The page of an evaluation, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mapo_fast.cli import app
from tests.browser import opened
from tests.score.test_evaluate import make


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    make(folder / "base", [10] * 12)
    make(folder / "tuned", [20] * 9 + [5] * 3)
    names = [str(folder / name) for name in ("base", "tuned")]
    arguments = ["evaluate", *names, "--score", "jpeg_size", "--out", str(folder / "out")]
    result = CliRunner().invoke(app, [*arguments, "--blind", str(folder / "blind.html")])
    assert result.exit_code == 0, result.output
    assert "jpeg_size, tuned: mean" in result.output
    return folder


def test_figures_and_page_are_there(out: Path) -> None:
    found = json.loads((out / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [*found["models"]] == ["base", "tuned"]
    page = (out / "out" / "evaluation.html").read_text(encoding="utf-8")
    assert "</script>" not in page  # prompts hold one
    assert "&lt;/script&gt;&lt;script&gt;" in page
    assert (out / "blind.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_a_phone_and_a_desk(out: Path, width: int) -> None:
    with opened(out / "out" / "evaluation.html", width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg[role=img]").count() == 2


def test_nothing_to_compare_by_is_one_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(out / "base"), "--out", str(out / "x")])
    assert "say how to compare" in str(result.exception)
