"""Names of previews, their settings, and the contact sheet."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mapo_fast.run.preview_files import file_name, jobs, save, step_folder, write_contact_sheet
from mapo_fast.settings.schema import Config

SIZES = ((64, 64), (64, 96))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        model={"path": "model"},
        data={"cache": "cache", "resolution": 64},
        train={"output": tmp_path, "steps": 1},
        preview={"prompts": ["a red ball", "日本"], "steps": 3, "seed": 5},
    )


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A portrait, of an OLD sailor!", "03-a-portrait-of-an-old-sailor.png"),
        ("Ünï/../çode\n\\", "03-uni-code.png"),
        ("日本", "03.png"),
        ("word " * 50, "03-word-word-word-word-word-word-word-word.png"),
    ],
)
def test_names_are_words_of_the_prompt(prompt: str, name: str) -> None:
    assert file_name(3, prompt, (64, 64), 64) == name
    assert file_name(3, prompt, (64, 96), 64) == name.replace(".png", "-96x64.png")


def test_settings_are_in_the_png(config: Config, tmp_path: Path) -> None:
    save(Image.new("RGB", (96, 64)), tmp_path / "x.png", config, 1, step=40)
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["parameters"] == (
            "日本\nSteps: 3, Sampler: Euler, CFG scale: 5, Seed: 5, Size: 96x64, Training step: 40"
        )


def test_the_contact_sheet_has_a_row_per_image_and_a_column_per_step(config: Config) -> None:
    for step, colour in ((0, "red"), (10, "blue")):
        step_folder(config, step).mkdir(parents=True)
        for index, (height, width), name in jobs(config, SIZES):
            save(
                Image.new("RGB", (width, height), colour),
                step_folder(config, step) / name,
                config,
                index,
                step,
            )
    with Image.open(write_contact_sheet(config, SIZES)) as sheet:
        for column, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
            corners = [sheet.getpixel((196 * column + 2, 16 + 196 * row + 2)) for row in range(4)]
            assert corners == [colour] * 4
        assert sheet.size == (2 * 196, 4 * 196 + 16)


def test_a_long_run_keeps_its_first_and_last_step_on_the_sheet(config: Config) -> None:
    for step in range(40):
        step_folder(config, step).mkdir(parents=True)
    folder = step_folder(config, 39)
    save(Image.new("RGB", (64, 64), "green"), folder / "00-a-red-ball.png", config, 0, 39)
    with Image.open(write_contact_sheet(config, SIZES)) as sheet:
        assert sheet.size[0] == 16 * 196
        assert sheet.getpixel((15 * 196 + 2, 18)) == (0, 128, 0)
