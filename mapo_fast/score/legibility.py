"""Legible text: how much of the text that the prompt puts in quotes can be read in the image."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np

from mapo_fast.score.scorer import Entry, register_scorer
from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_QUOTED = re.compile(r"[\"“«]([^\"”»]+)[\"”»]")


class LegibilityScorer:
    """Similarity, 0 … 1, of the quoted text and what rapidocr reads; 1 where the prompt asks for no text.

    Raises:
        UserError: rapidocr is not installed.
    """

    sha256 = ""

    def __init__(self) -> None:
        try:
            import rapidocr
        except ImportError:
            raise UserError("the legibility scorer needs rapidocr: pip install 'mapo_fast[score]'") from None
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
        self._read: Any = rapidocr.RapidOCR(params={"Global.log_level": "critical"})
        self.version = f"rapidocr {rapidocr.__version__}" if hasattr(rapidocr, "__version__") else "rapidocr"

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Score images, (n,) float32."""
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            asked = _plain(" ".join(_QUOTED.findall(prompt)))
            if not asked:
                scores.append(1.0)
                continue
            found = self._read(np.asarray(image.convert("RGB"))[:, :, ::-1])
            scores.append(SequenceMatcher(None, asked, _plain(" ".join(found.txts or ()))).ratio())
        return np.asarray(scores, dtype=np.float32)


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


register_scorer(
    "legibility",
    Entry(lambda _: LegibilityScorer(), (), "similarity of the prompt's quoted text and what rapidocr reads"),
)
