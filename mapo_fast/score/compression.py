"""Size of the image as JPEG, DDPO's reward without a model: larger is less compressible."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mapo_fast.score.scorer import Entry, register_scorer

if TYPE_CHECKING:
    from PIL.Image import Image

_QUALITY = 95


class JpegScorer:
    """Kilobytes (1000 bytes) of the image as JPEG of quality 95, with the sign that the reward has.

    Args:
        sign: 1 rewards size, −1 rewards small files.
    """

    version = "JPEG 95"
    sha256 = ""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Score images, (n,) float32."""
        sizes = []
        for image in images:
            image.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=_QUALITY)
            sizes.append(self.sign * len(buffer.getvalue()) / 1000)
        return np.asarray(sizes, dtype=np.float32)


register_scorer(
    "jpeg_size",
    Entry(
        lambda _: JpegScorer(1),
        (),
        "kilobytes as JPEG 95: incompressibility (Black et al., arXiv 2305.13301)",
    ),
)
register_scorer(
    "jpeg_compressibility",
    Entry(lambda _: JpegScorer(-1), (), "minus kilobytes as JPEG 95 (Black et al., arXiv 2305.13301)"),
)
