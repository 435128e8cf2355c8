"""PickScore, HPS and CLIPScore: a CLIP model's cosine of image and prompt, each on its own scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mapo_fast.score.clip import Clip, read_clip
from mapo_fast.score.scorer import Entry, register_scorer

if TYPE_CHECKING:
    from PIL.Image import Image


class CosineScorer:
    """`scale(clip)` × cosine of image and prompt.

    Args:
        path: of the CLIP model's weights.
        version: of the scorer.
        scale: factor of the cosine.
        floor: the least cosine that counts.
    """

    def __init__(self, path: Path, version: str, scale: Callable[[Clip], float], floor: float = -1.0) -> None:
        self.version, self.floor = version, floor
        self.clip, self.sha256 = read_clip(path)
        self.factor = scale(self.clip)

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Score images, (n,) float32."""
        cosines: np.ndarray = self.clip.cosines(images, prompts).clip(min=self.floor)
        return (self.factor * cosines).astype(np.float32)


def _hps(version: str) -> Entry:
    return Entry(
        lambda paths: CosineScorer(paths[0], version, lambda clip: 100.0),
        ("FILE",),
        "100 × cosine, about 20 to 35 (Wu et al., arXiv 2306.09341); the files of v2.0 and v2.1 have equal "
        "shapes, so the name says which it is",
    )


def _register() -> None:
    register_scorer(
        "pickscore",
        Entry(
            lambda paths: CosineScorer(paths[0], "PickScore v1", lambda clip: clip.scale),
            ("FOLDER",),
            "exp(logit_scale) × cosine, about 18 to 24 (Kirstain et al., arXiv 2305.01569)",
        ),
    )
    for name, version in (("hps20", "HPS v2.0"), ("hps21", "HPS v2.1")):
        register_scorer(name, _hps(version))
    register_scorer(
        "clipscore",
        Entry(
            lambda paths: CosineScorer(paths[0], "CLIPScore", lambda clip: 100.0, floor=0.0),
            ("FOLDER",),
            "100 × max(cosine, 0), as torchmetrics; the paper's is 2.5 × (Hessel et al., arXiv 2104.08718)",
        ),
    )


_register()
