"""The page of an evaluation, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mapo_fast.cli import app
from mapo_fast.demo import score
from mapo_fast.demo.run import TINY_SDXL
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sampling import sampling
from mapo_fast.score.manifest import Made, append, read
from tests.browser import opened
from tests.models.test_lora_file import text_lora
from tests.score.test_evaluate import make
from tests.tiny import make_tiny_sdxl


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


@pytest.mark.slow
def test_models_are_sampled_first(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\n", encoding="utf-8")
    models = [str(tiny_sdxl), str(make_tiny_sdxl(tmp_path / "other", seed=3))]
    arguments = ["evaluate", *models, "--score", "jpeg_size", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert "add --prompts FILE" in str(result.exception)
    with pytest.MonkeyPatch.context() as patch:
        small = sampling(None, {}, {"width": 64, "height": 64, "steps": 2})
        patch.setattr("mapo_fast.models.sampling.sampling", lambda *args: small)
        arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "5"]
        lora = text_lora(tmp_path / "lora.safetensors", open_sdxl(tiny_sdxl))
        strip = ["--blind", str(tmp_path / "blind.html"), "--strip", str(lora)]
        result = CliRunner().invoke(app, [*arguments, *strip])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["prompt"] for one in found["prompts"]] == ["a red ball", "a blue ball"]
    result = CliRunner().invoke(app, [*arguments, "--strip", "lora.safetensors"])
    assert "add --blind out.html" in str(result.exception)
    assert len(list((tmp_path / "out" / "images" / "other").glob("*.png"))) == 10
    folders = [tmp_path / "out" / "images" / "strip" / name for name in ("0.4", "1.2")]
    one, other = (read(folder)[0].settings["model"] for folder in folders)
    assert one != other
    assert '"strength": "0.8"' in (tmp_path / "blind.html").read_text(encoding="utf-8")


def test_nothing_to_compare_by_is_one_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(out / "base"), "--out", str(out / "x")])
    assert "say how to compare" in str(result.exception)


RULE = """\
import numpy as np
from mapo_fast.demo import world
from mapo_fast.score.scorer import Entry, register_scorer


class Rule:
    version, sha256 = "1", ""

    def __call__(self, images, prompts):
        asked = [next(shape for shape in world.SHAPES if shape in prompt) for prompt in prompts]
        wanted = [world.Reading(world.CHOSEN, shape) for shape in asked]
        found = [world.read(image) == reading for image, reading in zip(images, wanted)]
        return np.asarray(found, dtype=np.float32)


def register():
    register_scorer("demo_rule", Entry(lambda paths: Rule(), (), "the asked shape in the chosen colour"))
"""


@pytest.mark.slow
def test_the_demos_rule_as_an_installed_scorer_gives_the_demos_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_sdxl(TINY_SDXL)
    prompts = score.make_prompts(folder, with_colour=False, count=24, seed=0, device="cpu")
    samples = score.sample(folder.load_unet(), folder.load_vae(torch.float32), folder, prompts, 4)
    (tmp_path / "images").mkdir()
    for image, caption, seed in zip(samples.images, prompts.captions, prompts.seeds, strict=True):
        path = tmp_path / "images" / f"{seed}.png"
        image.save(path)
        append(tmp_path / "images", Made(path, caption, seed, {}))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "demo_rule_scorer.py").write_text(RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    arguments = ["evaluate", str(tmp_path / "images"), "--score", "demo_rule", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--allow-code", "demo_rule_scorer:register"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    share, _ = score.share(samples, prompts, score.preferred)
    assert 0 < share < 1
    assert found["results"]["demo_rule"]["means"]["images"]["value"] == share
