"""Size of the image as JPEG."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mapo_fast.score.compression import JpegScorer


def test_size_as_jpeg() -> None:
    plain = Image.new("RGB", (64, 64), "red")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    size, small = JpegScorer(1), JpegScorer(-1)
    found = size([plain, noise], ["", ""])
    assert found[1] > 5 * found[0] > 0
    np.testing.assert_array_equal(small([plain, noise], ["", ""]), -found)
