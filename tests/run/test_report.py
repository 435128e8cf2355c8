"""The page of a run."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mapo_fast import __version__
from mapo_fast.cli import app
from mapo_fast.run.log import LOG_FILE
from mapo_fast.run.report import write_report
from mapo_fast.run.train import fit
from mapo_fast.util.errors import UserError
from tests.browser import opened
from tests.training import make_cache, make_config

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cache = make_cache(tiny_sdxl, folder / "data")
    (cache / "skipped.jsonl").write_text(json.dumps({"reason": f"x {HOSTILE}"}) + "\n")
    train = {"steps": 4, "evaluate_every": 2, "log_every": 1}
    preview = {"prompts": [HOSTILE], "steps": 1}
    fit(make_config(tiny_sdxl, cache, folder / "run", train=train, preview=preview))
    with (folder / "run" / LOG_FILE).open("a") as log:
        log.write(json.dumps({"event": "warning", "step": 4, "time": 0, "message": HOSTILE}) + "\n")
    return folder / "run"


@pytest.mark.slow
def test_a_run_on_one_page(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Step 4 of 4, finished" in page
    for text in (
        "Chosen error, change",
        "Margin, change",
        "Saturation",
        "By noise level",
        "before</div>",
        "skipped: x",
        "image brightness alone predicts the label",
    ):
        assert text.replace("before</div>", ", before") in page, text
    assert "<script" not in page
    assert str(run.parent) not in page
    write_report(run, tmp_path / "full.html", full_paths=True)
    assert str(run.parent) in (tmp_path / "full.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_a_phone_and_a_desk(run: Path, tmp_path: Path, width: int) -> None:
    write_report(run, tmp_path / "r.html")
    with opened(tmp_path / "r.html", width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg[role=img]").count() >= 6


@pytest.mark.slow
def test_a_run_starts_with_what_the_page_says(run: Path, tmp_path: Path) -> None:
    """As on a GPU, from the command line: memory planned and used, the command, versions."""
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.json", LOG_FILE, "settings.json"):
        (again / name).write_bytes((run / name).read_bytes())
    start = json.loads((run / LOG_FILE).read_text().splitlines()[0])
    assert start["device"] == "cpu"
    assert start["versions"]["torch"] == torch.__version__
    command = [
        "mapo-fast",
        "train",
        "/home/me/my config.toml",
        "--model=/srv/a.safetensors",
        "--set",
        "a.b=~/c",
    ]
    planned = {"planned_memory_mib": 7890.4, "planned_reserved_mib": 8000, "planned_ms": 3}
    step = {"event": "step", "step": 4, "peak_memory_mib": 7654.3}
    with (again / LOG_FILE).open("a") as log:
        log.writelines(json.dumps(entry) + "\n" for entry in ({**start, **planned, "command": command}, step))
    write_report(again, tmp_path / "r.html")
    page = html.unescape((tmp_path / "r.html").read_text(encoding="utf-8"))
    for text in (
        'mapo-fast train "…/my config.toml" --model=…/a.safetensors --set a.b=…/c',
        "7,890 MiB, 8,000 MiB reserved",
        "7,654 MiB",
        f"mapo_fast {__version__}, python",
    ):
        assert text in page
    write_report(again, tmp_path / "r.html", full_paths=True)
    assert "--model=/srv/a.safetensors" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run's folder"):
        write_report(tmp_path, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
