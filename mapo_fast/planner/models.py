"""Which UNet is planned for: its `config.json`, or SDXL's by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapo_fast.errors import UserError
from mapo_fast.model import open_sdxl

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


def unet_config(model: str) -> dict[str, Any]:
    """The UNet's config of "sdxl", or of a diffusers pipeline folder.

    Raises:
        UserError: the folder is no SDXL pipeline.
    """
    if model.lower() == "sdxl":
        return SDXL_UNET
    try:
        return open_sdxl(Path(model)).config("unet")
    except UserError as error:
        raise UserError(f"{error}; without a folder: --model sdxl") from None
