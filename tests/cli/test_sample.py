"""`mapo-fast sample` from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from mapo_fast import cli
from mapo_fast.score import sample as module
from mapo_fast.score.manifest import read


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mapo-fast", "sample", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a (red:1.2) cat <lora:x:1>\nblue\n")
    return path


def test_images_are_made_and_then_are_there(
    tiny_sdxl: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = [tiny_sdxl, "--prompts", prompts, "--out", out, "--size", "32x48", "--steps", 2, "--seeds", 2]
    assert run(monkeypatch, *options, "--preset", "comfyui") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning") == 2
    assert f"4 images in {out}" in printed.replace("\n", "")
    images = read(out)
    assert [(one.prompt, one.seed) for one in images] == [
        (p, s) for p in ("a red cat", "blue") for s in (0, 1)
    ]
    assert images[0].settings["cfg"] == 8
    assert run(monkeypatch, *options, "--preset", "comfyui") == 0
    assert f"4 images in {out}, 0 of them new" in capsys.readouterr().out.replace("\n", "")
    assert run(monkeypatch, *options) == 2
    assert "have cfg = 8.0, now it is 5.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "big"], "--size 'big': write WIDTHxHEIGHT in pixels, such as 832x1216"),
        (["--seeds", "0"], "--seeds 0: must be 1 to 10,000"),
        (["--steps", "0"], "--steps 0: steps must be 1 to 1000"),
        (["--like", "none.png"], "--like none.png: No such file"),
        (["--lora", "none=x"], "--lora = 'none=x': 'x' is no weight"),
        (["--sampler", "ddim", "--schedule", "karras"], "ddim has no schedule karras"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tiny_sdxl: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    assert run(monkeypatch, tiny_sdxl, "--prompts", prompts, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_of_a_picture_are_taken(
    tiny_sdxl: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a dog\nNegative prompt: (blurry:1.4)\nSteps: 9, Sampler: Euler a, CFG scale: 7, Seed: 5, "
        "Size: 48x32, Hires upscale: 2",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png", pnginfo=info)
    options = ["--prompts", prompts, "--out", tmp_path / "out", "--like", tmp_path / "mine.png", "--steps", 2]
    assert run(monkeypatch, tiny_sdxl, *options) == 0
    printed = capsys.readouterr().out
    assert "weights as in (word:1.2) in the negative prompt are not applied" in printed
    assert "Hires upscale" in printed
    settings = read(tmp_path / "out")[0].settings
    taken = {
        "steps": 2,
        "cfg": 7,
        "width": 48,
        "height": 32,
        "sampler": "euler_ancestral",
        "negative": "blurry",
    }
    assert settings.items() >= taken.items()
    assert (settings["unconditional"], settings["spacing"]) == ("zeros", "linspace")


def test_an_interrupt_says_how_to_go_on(
    tiny_sdxl: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sample", interrupted)
    assert run(monkeypatch, tiny_sdxl, "--prompts", prompts, "--out", tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err
