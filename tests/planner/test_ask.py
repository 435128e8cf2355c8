"""`mapo-fast plan`, from its arguments to its text, its JSON, its picture and its exit code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from mapo_fast import cli
from mapo_fast.planner import answer
from mapo_fast.planner import ask as planner_ask
from mapo_fast.planner.question import question
from mapo_fast.settings.load import load_config, parse_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB
from mapo_kernels.hardware import Card

pytestmark = pytest.mark.usefixtures("planned_here")


def planned_for(settings: list[str]) -> Config:
    return question(None, None, settings, None)[0]


def plan(monkeypatch: pytest.MonkeyPatch, model: Path, *args: str) -> int:
    """The exit code."""
    given = ["mapo-fast", "plan", "--model", str(model), "--resolution", "64", "--ram", "64GiB", *args]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_a_plan_as_text_as_json_and_as_a_picture(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "memory.png"
    assert plan(monkeypatch, tiny_sdxl, "--card", "RTX 3060 12GB", "--plot", str(picture)) == 0
    text = capsys.readouterr().out
    first, _, command, *_ = text.split("\n")
    assert re.fullmatch(
        r"fits: \d\.\d of 12 GiB; about 0\.\d\d s a step of 4 pairs, 600 steps in .* (s|min); "
        "predicted for RTX 3060 12GB",
        first,
    )
    assert command == (
        f"  mapo-fast train --preset lora --model {tiny_sdxl} --data PAIRS --set data.resolution=64"
    )
    for part in ("weights", "gradients", "optimizer states", "working memory", "CUDA and its libraries"):
        assert f"\n  {part} " in text
    assert "12 GiB of GPU memory and 64 GiB of system RAM are free" in text
    assert "train.layout = " in text
    assert "not chosen:" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plan(monkeypatch, tiny_sdxl, "--card", "RTX 3060 12GB", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind_of_figure"] == "predicted"
    assert found["card"] == "RTX 3060 12GB"
    assert found["vram"] == 12 * GIB
    assert sum(n for name, n in found["plan"]["device"].items() if name != "host") == found["plan"]["peak"]
    assert f"\nhow: {found['plan']['name']}\n" in text
    assert found["fits"]
    assert (found["preset"], found["steps"], f"  {found['command']}") == ("lora", 600, command)
    assert found["sentence"] == first
    assert found["seconds"] == round(found["steps"] * found["plan"]["ms"] / 1e3)
    assert all(other["reason"] for other in found["others"])


@pytest.mark.slow
def test_a_folder_of_configs_is_enough(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heavy = shutil.ignore_patterns("*.safetensors", "vocab.json", "merges.txt", "tokenizer.json")
    shutil.copytree(tiny_sdxl, tmp_path / "configs", ignore=heavy)
    texts = []
    models = (tiny_sdxl, tmp_path / "configs")
    for model in models:
        assert plan(monkeypatch, model, "--card", "RTX 3060 12GB") == 0
        texts.append(capsys.readouterr().out)
    answers = [text.replace(str(model), "MODEL") for text, model in zip(texts, models, strict=True)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_what_does_not_fit_says_what_would_and_that_fits(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, tiny_sdxl, "--vram", "560MiB") == 3
    text = capsys.readouterr().out
    assert text.startswith("does not fit: of 0.547 GiB, 0.00 are left for training")
    (line,) = (line for line in text.splitlines() if line.endswith("would do"))
    assert plan(monkeypatch, tiny_sdxl, *line.split()[:2]) == 0


@pytest.mark.slow
def test_previews_are_planned_for_the_folders_own_vae(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plans use the model's VAE, as a run does: SDXL's alone is more than what is left of 700 MiB."""
    prompt = 'preview.prompts=["red square"]'
    assert plan(monkeypatch, tiny_sdxl, "--vram", "700MiB", "--set", prompt) == 0
    assert capsys.readouterr().out.startswith("fits: ")
    assert plan(monkeypatch, tiny_sdxl, "--vram", "560MiB", "--set", prompt) == 3
    assert capsys.readouterr().out.startswith("does not fit")


@pytest.mark.parametrize(
    ("written", "card", "vram", "expected"),
    [
        (None, "RTX 3060 12GB", None, 12),
        (None, "RTX 3060 12GB", "10GiB", 10),
        ("24GiB", None, None, 24),
        ("24GiB", None, "10GiB", 10),
        ("24GiB", "RTX 3060 12GB", None, 12),
        ("6GiB", "RTX 3060 12GB", None, 6),
    ],
)
def test_a_plan_has_what_a_run_on_the_card_would_have(
    tiny_sdxl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: str | None,
    card: str | None,
    vram: str | None,
    expected: int,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(planner_ask, "search", lambda *args, **_: asked.append(args))
    config = tmp_path / "config.toml"
    train = {"output": "run"} | ({} if written is None else {"vram": written})
    table = {"model": {"path": str(tiny_sdxl)}, "data": {"cache": "cache"}, "train": train}
    config.write_text(tomli_w.dumps(table))
    answer.plan(load_config(config), vram=vram, card=card, ram="64GiB")
    assert asked[0][3] == expected * GIB


def test_a_size_in_the_config_is_checked_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.vram = 'lots' is not a size"):
        planned_for(["train.vram=lots"])


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ("adapter.base='fp8'", "use adapter.base = 'int8', as small and more exact"),
        ("speed.fp8=true", "set speed.fp8 = false"),
    ],
)
def test_a_card_that_cannot_multiply_fp8_is_refused(
    setting: str, instead: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of the run; without a card one that can is assumed."""
    asked: list[Any] = []
    monkeypatch.setattr(planner_ask, "search", lambda *args, **_: asked.append(args))
    kind = "lora" if "base" in setting else "full"
    given = ["mapo-fast", "plan", "--adapter", kind, "--set", setting, "--card", "RTX 3090"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    name = setting.replace("=", " = ")
    assert err == (
        f"mapo-fast: {name} needs Triton, Linux and a GPU of compute capability 8.9 or newer (RTX 40, H100), "
        f"not RTX 3090 (8.6): {instead}\n"
    )
    assert not asked
    for settings in ([setting], []):
        answer.plan(planned_for([f"adapter.kind={kind}", *settings]), vram="24GiB", ram="64GiB", model="sdxl")
    assert asked[0][2].name == "RTX 4090"
    assert asked[1][2].name == "RTX 3090"


def test_a_step_that_no_graph_holds_is_refused_before_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_ask, "search", lambda *args: pytest.fail("planned"))
    settings = ["adapter.kind=full", "speed.cuda_graph=true", "train.accumulation=2"]
    with pytest.raises(UserError, match="holds a step of one micro-batch"):
        answer.plan(planned_for(settings), vram="24GiB", ram="64GiB", model="sdxl")
    offloaded = [
        "adapter.kind=full",
        "speed.cuda_graph=true",
        "train.accumulation=1",
        "offload.activations='cpu'",
    ]
    with pytest.raises(UserError, match=r"holds no copies from system RAM.*use speed\.cuda_graph = false"):
        answer.plan(planned_for(offloaded), vram="24GiB", ram="64GiB", model="sdxl")


def test_a_run_is_refused_before_it_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_ask, "card_of", lambda device: pytest.fail("measured"))
    monkeypatch.setattr("mapo_fast.engine.fp8.in_fp8", lambda device: False)
    monkeypatch.setattr("mapo_fast.engine.fp8.card", lambda device: Card(86, 82))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    lora = {"kind": "lora", "base": "fp8"}
    table = {"model": {"path": "m"}, "data": {"cache": "c"}, "train": {"output": "run"}, "adapter": lora}
    with pytest.raises(UserError, match=r"RTX 3090 \(8\.6\): use adapter\.base = 'int8'"):
        planner_ask.plan_run(parse_config(table), None, 24 * GIB, torch.device("cuda"))  # type: ignore[arg-type]


def test_a_resolution_that_is_none_is_one_line(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, tiny_sdxl, "--resolution", "abc", "--card", "RTX 3060 12GB") == 2
    expected = "mapo-fast: --resolution 'abc' is not a number of pixels: write --resolution 1024\n"
    assert capsys.readouterr().err == expected
    assert plan(monkeypatch, tiny_sdxl, "--resolution", "65", "--card", "RTX 3060 12GB") == 2
    assert "data.resolution" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "settings", "expected"),
    [
        (None, [], "lora"),
        (None, ["adapter.kind=full"], "full"),
        ("kto-lora", [], "kto-lora"),
    ],
)
def test_without_a_config_a_preset_is_planned(preset: str | None, settings: list[str], expected: str) -> None:
    config, run = question(None, preset, settings, None)
    theirs = load_config(None, ["model.path=m", "data.source=d"], preset=expected)
    for section in ("adapter", "objective", "optim", "preview"):
        assert getattr(config, section) == getattr(theirs, section)
    assert run.preset == expected
    assert run.command == f"mapo-fast train --preset {expected} --model MODEL.safetensors --data PAIRS"
    assert run.images == {"lora": "4 pairs", "full": "32 pairs", "kto-lora": "16 images"}[expected]


def test_what_to_paste_has_what_was_asked_with(tmp_path: Path) -> None:
    config = tmp_path / "my config.toml"
    config.write_text("[train]\nsteps = 7\n")
    settings, run = question(config, None, ["optim.lr=1e-6"], "sdxl")
    assert (settings.optim.lr, run.steps, run.preset) == (1e-6, 7, None)
    assert run.command == f"mapo-fast train '{config}' --model MODEL.safetensors --set optim.lr=1e-6"
    assert question(None, "full", ["train.accumulation=1"], "a.safetensors")[1].command == (
        "mapo-fast train --preset full --model a.safetensors --data PAIRS --set train.accumulation=1"
    )


def test_a_card_without_bf16_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planner_ask, "search", lambda *args, **_: pytest.fail("planned"))
    given = ["mapo-fast", "plan", "--card", "RTX 2060 12GB"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "mapo-fast: RTX 2060 12GB cannot do bf16 (train.precision = 'bf16'): use 'fp16' with adapter.kind = "
        "'lora', or 'fp32'\n"
    )
