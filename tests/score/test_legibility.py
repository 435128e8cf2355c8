"""Legible text by a real reader."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw, ImageFont

from mapo_fast.score.legibility import LegibilityScorer

pytest.importorskip("rapidocr", reason="the score extra is missing")


def test_text_that_can_be_read_scores_higher() -> None:
    scorer = LegibilityScorer()
    asked = Image.new("RGB", (400, 120), "white")
    ImageDraw.Draw(asked).text((20, 30), "Hello World", fill="black", font=ImageFont.load_default(48))
    blank = Image.new("RGB", (400, 120), "white")
    prompt = 'a sign that says "hello world"'
    scores = scorer([asked, blank, blank], [prompt, prompt, "a dog"])
    assert scores.tolist() == [1.0, 0.0, 1.0]
