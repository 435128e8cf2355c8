"""Which UNet and VAE are planned for: a model's, or SDXL's by name."""

from __future__ import annotations

from typing import Any

from mapo_fast.models.open import open_model
from mapo_fast.planner.stages import SDXL_VAE, Vae, vae_of
from mapo_fast.settings.given import user_path
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL-base 1.0: 2,567,463,684 parameters."""


def parts_of(model: str, config: Config) -> tuple[dict[str, Any], Vae]:
    """The UNet's config and the VAE of "sdxl", or of a model, of which no weights are needed.

    Args:
        config: for another VAE's folder, and the noise schedule that `[train]` states.

    Raises:
        UserError: it is no SDXL model.
    """
    if model.lower() == "sdxl":
        return SDXL_UNET, SDXL_VAE
    try:
        folder = open_model(config, user_path("--model", model), weights=False)
        return folder.config("unet"), vae_of(folder)
    except UserError as error:
        raise UserError(f"{error}; without a model: --model sdxl") from None
