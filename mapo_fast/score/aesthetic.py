"""LAION's aesthetic predictor v2: a linear head, in several layers, on CLIP ViT-L/14's image embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mapo_fast.score.clip import read_clip
from mapo_fast.score.scorer import Entry, register_scorer
from mapo_fast.score.weights import read_weights
from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers in the published head; dropout, which does nothing here, lies between."""


class AestheticScorer:
    """Head(normalised image embedding), about 1 to 10; the prompt does not count.

    Args:
        head: `sac+logos+ava1-l14-linearMSE.pth`, or the same as safetensors.
        clip: OpenAI's CLIP ViT-L/14.

    Raises:
        UserError: wrong files, or a head for embeddings of another width.
    """

    version = "LAION aesthetic v2"

    def __init__(self, head: Path, clip: Path) -> None:
        state, head_digest = read_weights(head)
        self.clip, clip_digest = read_clip(clip)
        self.sha256 = f"{head_digest}+{clip_digest}"
        self.head = nn.Sequential(*(_linear(state, position, head) for position in _LAYERS)).eval()
        width, wanted = self.clip.model.config.projection_dim, self.head[0].in_features
        if width != wanted:
            raise UserError(
                f"{head} takes embeddings of {wanted} numbers, {clip} gives {width}: it needs CLIP ViT-L/14"
            )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Score images, (n,) float32."""
        scores: Tensor = self.head(self.clip.images(images))[:, 0]
        return scores.float().cpu().numpy()


def _linear(state: dict[str, Tensor], position: int, where: Path) -> nn.Linear:
    try:
        weight, bias = state[f"layers.{position}.weight"].float(), state[f"layers.{position}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
    except (KeyError, IndexError, RuntimeError):
        raise UserError(
            f"{where} is no head of LAION's aesthetic predictor v2: layers.{position} is missing or misshapen"
        ) from None
    return layer


register_scorer(
    "aesthetic",
    Entry(
        lambda paths: AestheticScorer(*paths),
        ("HEAD", "CLIP"),
        "linear head on CLIP ViT-L/14, about 1 to 10 (Schuhmann et al., arXiv 2210.08402)",
    ),
)
