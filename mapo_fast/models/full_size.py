"""The configs of SDXL-base 1.0, for plans without a model and for reading a LoRA without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapo_fast.models.parts import Part

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
"""2,567,463,684 parameters."""
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_OPEN_CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def sdxl_parts() -> dict[str, Part]:
    """The parts that a LoRA may touch, without weights."""
    configs = {"unet": SDXL_UNET, "text_encoder": _CLIP, "text_encoder_2": _OPEN_CLIP}
    return {name: Part(name, Path("SDXL"), Path("SDXL"), config, {}) for name, config in configs.items()}
