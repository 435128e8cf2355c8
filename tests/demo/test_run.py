"""A very small demo from end to end, and its report."""

import base64
import html
import io
import json
import re
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from rich.console import Console

from bench.demo import OBJECTIVES, of_plan
from bench.memory_table import ROWS
from mapo_fast.demo import report, score, world
from mapo_fast.demo.run import TINY_SDXL, DemoSize, run_demo
from mapo_fast.run.folder import recorded_settings
from mapo_fast.settings.load import load_config
from mapo_fast.settings.schema import ObjectiveConfig
from mapo_fast.util.errors import UserError
from tests.browser import opened
from tests.files_of_models import make_file

SMALL = DemoSize(pairs=24, steps=2, samples=12, sampling_steps=2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    text = io.StringIO()
    run_demo(out, seed=3, console=Console(file=text, width=120), size=SMALL)
    return out, text.getvalue()


@pytest.mark.slow
def test_report_json_has_the_figures(demo: tuple[Path, str]) -> None:
    result = json.loads((demo[0] / "report.json").read_text(encoding="utf-8"))
    for figure in ("preferred_share", "unchanged_score"):
        assert set(result[figure]) == {"before", "sft", "mapo"}
        for model, value in result[figure].items():
            low, high = result["intervals_95"][figure][model]
            assert 0 <= low <= value <= high <= 1
        assert result["samples_per_cell"][figure] == SMALL.samples
    assert result["seconds"] > 0
    assert result["seed"] == 3
    for shares in result["colours"].values():
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_report_html_is_self_contained_and_says_the_same(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    result = json.loads((demo[0] / "report.json").read_text(encoding="utf-8"))
    sources = re.findall(r'(?:src|href|srcset|data|action)\s*=\s*"([^"]{0,60})', page)
    assert len(sources) == 13  # two sets of three grids, the pairs, six charts
    assert all(source.startswith("data:image/") for source in sources)
    without_images = re.sub(r'"data:[^"]*"', '""', page)
    assert not re.search(r"https?:|<script\s|<link|<iframe|@import|url\(", without_images)
    warned = [one["message"] for found in result["warnings"].values() for one in found]
    assert all(html.escape(message) in page for message in warned)
    assert ("gave no warning" in page) == (not warned)
    for figure in ("preferred_share", "unchanged_score"):
        for model in report.model_names("mapo"):
            assert f"<td>{report.percent(result, figure, model)}" in page
    images = re.findall(r"<img[^>]*>", page, flags=re.S)
    assert len(images) == 13
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in images)
    for data in re.findall(r"data:image/png;base64,([^\"]+)", page):
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_report_html_fits_a_phone_and_a_desk(demo: tuple[Path, str], width: int) -> None:
    with opened(demo[0] / "report.html", width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click(".commands button")
        assert page.inner_text(".commands button") in ("Copied", "Selected")
        assert page.evaluate("getSelection().toString().trim()") == page.inner_text(".commands code").strip()


@pytest.mark.slow
def test_picture_and_configs_are_there(demo: tuple[Path, str]) -> None:
    out = demo[0]
    with Image.open(out / "report.png") as picture:
        assert picture.width > 1000
    mapo, sft = (load_config(out / f"config_{name}.toml") for name in ("mapo", "sft"))
    assert (mapo.objective.name, sft.objective.name) == ("mapo", "sft")
    # The same start, data, seed and budget: only the objective and the output differ.
    for section in ("model", "data", "adapter", "optim"):
        assert getattr(mapo, section) == getattr(sft, section)
    assert mapo.train.model_copy(update={"output": sft.train.output}) == sft.train
    for name in ("mapo", "sft"):
        UNet2DConditionModel.from_pretrained(out / name / "unet", local_files_only=True)


@pytest.mark.slow
def test_it_ends_with_the_table_and_the_next_command(demo: tuple[Path, str]) -> None:
    lines = demo[1].rstrip().splitlines()
    assert "MaPO" in demo[1].split("share of images")[1]
    assert lines[-1].endswith("train --preset lora --model YOUR_MODEL.safetensors --data YOUR_PAIRS")


@pytest.mark.slow
def test_nothing_is_overwritten(demo: tuple[Path, str], tmp_path: Path) -> None:
    before = (demo[0] / "report.json").read_bytes()
    with pytest.raises(UserError, match="already holds another demo's report"):
        run_demo(demo[0], console=Console(quiet=True), size=SMALL)
    assert (demo[0] / "report.json").read_bytes() == before
    (tmp_path / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="something else"):
        run_demo(tmp_path, console=Console(quiet=True), size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_wilson_interval() -> None:
    # Wilson 1927 at 10 of 20, and the ends, where the normal interval has no width.
    assert score.wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert score.wilson(0, 256)[0] == 0.0
    assert score.wilson(0, 256)[1] == pytest.approx(0.0148, abs=1e-4)
    assert score.wilson(256, 256)[1] == 1.0


def test_scores_need_the_right_shape_too() -> None:
    circle = world.Drawing("circle", "blue", 16, 16, 7, 230, "large", "in the middle")
    assert score.preferred(world.Reading("red", "circle"), circle)
    assert not score.preferred(world.Reading("red", "square"), circle)
    assert not score.preferred(world.Reading("blue", "circle"), circle)
    assert score.correct(world.Reading("blue", "circle"), circle)
    assert not score.correct(world.Reading("red", "circle"), circle)
    assert not score.correct(world.Reading("blue", None), circle)


TINY = DemoSize(pairs=24, steps=1, samples=1, sampling_steps=1)


@pytest.mark.slow
def test_diffusion_kto_gets_the_images_one_by_one(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "out", console=Console(quiet=True), size=TINY, objective="kto")
    assert set(result["preferred_share"]) == {"before", "sft", "kto"}
    made = recorded_settings(tmp_path / "out" / "kto")
    assert made is not None
    assert made["data"]["source"].endswith("images.parquet")
    assert "each with a label" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def one_of_each_need() -> list[str]:
    """The first objective of those that ask the same of the data; single images have a test of their own."""
    first: dict[tuple[object, ...], str] = {}
    for name in OBJECTIVES:
        known = ObjectiveConfig(name=name).known
        if known.samples == "pair":
            first.setdefault((known.reference, known.labels == "required", known.swapped), name)
    return [name for name in first.values() if name != "mapo"]  # the fixture's


@pytest.mark.slow
@pytest.mark.parametrize("objective", one_of_each_need())
def test_it_runs_whatever_an_objective_needs(tmp_path: Path, objective: str) -> None:
    """`tests/engine/test_objectives.py` trains with all."""
    result = run_demo(tmp_path / "out", console=Console(quiet=True), size=TINY, objective=objective)
    assert set(result["preferred_share"]) == {"before", "sft", objective}


@pytest.mark.slow
def test_it_runs_under_another_plan(tmp_path: Path) -> None:
    """`tests/run/test_plans.py` trains under all."""
    plan = next(plan for name, _, _, plan in ROWS if "nf4" in name)
    sets = [*of_plan(plan), f"train.steps={TINY.steps + 1}", "optim.warmup_steps=0"]
    result = run_demo(tmp_path / "out", console=Console(quiet=True), size=TINY, overrides=sets)
    assert result["settings"]["set"] == sets
    assert result["settings"]["steps"] == TINY.steps + 1
    made = recorded_settings(tmp_path / "out" / "mapo")
    assert made is not None
    for name, value in plan.items():
        section, key = name.split(".")
        assert made[section][key] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["train.output=elsewhere"]}, "use --out and --objective"),
        ({"objective": "../../x"}, r"--objective '\.\./\.\./x' is not known: use one of mapo, "),
        ({"objective": 'a"b'}, "is not known: use one of mapo, "),
        ({"overrides": ["objective.name=sft"]}, "use --out and --objective"),
        ({"overrides": ["train.step=3"]}, "did you mean train.steps"),
        ({"objective": "sft"}, "name another objective"),
    ],
)
def test_a_wrong_setting_leaves_nothing_behind(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_demo(tmp_path / "out", console=Console(quiet=True), size=TINY, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_single_file_gives_the_figures_of_its_folder(demo: tuple[Path, str], tmp_path: Path) -> None:
    file = make_file(TINY_SDXL, tmp_path / "tiny.safetensors")
    named = [f"model.path={json.dumps(str(file))}", f"model.tokenizers={json.dumps(str(TINY_SDXL))}"]
    result = run_demo(
        tmp_path / "out", seed=3, console=Console(file=io.StringIO()), size=SMALL, overrides=named
    )
    folder = json.loads((demo[0] / "report.json").read_text(encoding="utf-8"))
    for figure in ("preferred_share", "unchanged_score", "intervals_95", "colours"):
        assert json.loads(json.dumps(result[figure])) == folder[figure]
    assert (tmp_path / "out" / "mapo" / "model.safetensors").is_file()
