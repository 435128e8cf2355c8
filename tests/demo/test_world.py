"""The drawn world: what the rule reads, determinism, the preference set on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapo_fast.demo import world


@pytest.mark.slow
def test_rule_reads_every_drawing() -> None:
    wrong = [
        drawing
        for _, drawing in world.captioned_drawings(600, seed=3)
        if world.read(drawing.image()) != world.Reading(drawing.colour, drawing.shape)
    ]
    assert wrong == []


def test_rule_reads_nothing_in_noise_or_an_empty_image() -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(50)]
    assert {world.read(image).shape for image in noise} == {None}
    assert world.read(Image.new("RGB", (32, 32), (220, 220, 220))) == world.Reading(None, None)


def test_rule_reads_the_colour_that_is_there_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = world.Drawing("square", "red", 16, 16, 7, 230, "large", "in the middle")
    swapped = Image.fromarray(np.ascontiguousarray(np.asarray(drawing.image())[..., ::-1]))
    assert world.read(swapped) == world.Reading("blue", "square")
    monkeypatch.setitem(world.COLOURS, "red", (150, 40, 200))
    purple = drawing.image()
    monkeypatch.undo()
    assert world.read(purple) == world.Reading(None, "square")


def test_halves_of_different_shapes_are_no_shape() -> None:
    circle = world.Drawing("circle", "red", 16, 16, 7, 230, "large", "in the middle").image()
    torn = Image.new("RGB", (32, 32), (230, 230, 230))
    torn.paste(circle.crop((0, 0, 32, 16)), (0, -6))
    torn.paste(circle.crop((0, 16, 32, 32)), (0, 22))
    assert world.read(torn) == world.Reading("red", None)


def test_captions_without_a_colour_are_two_fifths() -> None:
    captions = [caption for caption, _ in world.captioned_drawings(2000, seed=0)]
    share = sum(not any(colour in caption for colour in world.COLOURS) for caption in captions) / 2000
    assert share == pytest.approx(0.4, abs=0.035)  # three standard errors


def test_drawings_are_a_function_of_the_seed() -> None:
    assert world.captioned_drawings(20, seed=1) == world.captioned_drawings(20, seed=1)
    assert world.captioned_drawings(20, seed=1) != world.captioned_drawings(20, seed=2)
    assert world.preference_pairs(20, seed=1) == world.preference_pairs(20, seed=1)
    assert world.preference_pairs(20, seed=1) != world.preference_pairs(20, seed=2)


def test_preference_set_on_disk(tmp_path: Path) -> None:
    world.write_preference_set(tmp_path / "pairs", world.preference_pairs(12, seed=0))
    lines = (tmp_path / "pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12
    for line in lines:
        row = json.loads(line)
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert not any(colour in row["prompt"] for colour in world.COLOURS)
        chosen = Image.open(tmp_path / "pairs" / row["chosen"])
        rejected = Image.open(tmp_path / "pairs" / row["rejected"])
        assert (world.read(chosen).colour, world.read(rejected).colour) == ("red", "blue")
        assert world.read(chosen).shape == world.read(rejected).shape in row["prompt"]
        # The same geometry: what differs from the background is the same set of pixels.
        masks = [np.asarray(image).std(axis=2) > 2 for image in (chosen, rejected)]
        assert (masks[0] == masks[1]).mean() > 0.995


def test_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        world.coverage("hexagon", 16, 16, 5)
