"""Configs of SDXL's parts from the shapes of their tensors in a single file, which has no configs.

Shapes give widths, depths and numbers of layers. All other fields are the same in every SDXL model: attention
heads 64 wide, groups of 32 channels, the VAE's scale, CLIP's activations. A file that differs in these (such
as the tiny models of tests and demo) has them in its metadata, see `parts.CONFIGS_KEY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""A part's shapes by original key, without prefix."""

SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
    "use_karras_sigmas": False,
    "clip_sample": False,
}
"""Scheduler config of SDXL-base 1.0, without the prediction type."""

_HEAD = 64
"""Width of an attention head."""
_LAYERS = {768: 12, 1280: 32}
"""Layers of SDXL's text encoders by width, so that a file without the last ones is noticed."""


class MissingKeyError(KeyError):
    """A key that a part's config is read from is missing."""


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """A UNet's config as diffusers has it.

    Raises:
        MissingKeyError: a key that the config is read from is missing, or has an unexpected shape.
    """
    widths, layers, depths = [], [], []
    width, count, depth, block = _dim(shapes, "input_blocks.0.0.weight", 0), 0, 0, 1
    while any(key.startswith(f"input_blocks.{block}.") for key in shapes):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            widths.append(width)
            layers.append(count)
            depths.append(depth)
            count = depth = 0
        else:
            width = _dim(shapes, f"input_blocks.{block}.0.out_layers.3.weight", 0)
            count += 1
            depth = _numbered(shapes, f"input_blocks.{block}.1.transformer_blocks.")
        block += 1
    widths.append(width)
    layers.append(count)
    depths.append(depth)
    attention = (f"input_blocks.{number}.1" for number in range(block))
    attended = next((place for place in attention if f"{place}.norm.weight" in shapes), "input_blocks.4.1")
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": _dim(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _dim(shapes, "out.2.weight", 0),
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "attention_head_dim": [max(width // _HEAD, 1) for width in widths],
        "cross_attention_dim": _dim(shapes, f"{attended}.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(shapes.get(f"{attended}.proj_in.weight", ())) == 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": _dim(shapes, "label_emb.0.0.weight", 1),
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """A VAE's config as diffusers has it. Raises `MissingKeyError` as `unet_config`."""
    levels = _numbered(shapes, "encoder.down.")
    widths = [_dim(shapes, f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _dim(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _dim(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _dim(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _numbered(shapes, "encoder.down.0.block."),
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """CLIP ViT-L's config as transformers has it. Raises `MissingKeyError` as `unet_config`."""
    vocabulary, width = (_dim(shapes, "embeddings.token_embedding.weight", i) for i in (0, 1))
    return _text_config(
        vocabulary,
        width,
        positions=_dim(shapes, "embeddings.position_embedding.weight", 0),
        layers=_LAYERS.get(width) or _numbered(shapes, "encoder.layers."),
        inner=_dim(shapes, "encoder.layers.0.mlp.fc1.weight", 0),
        projection=width,
        activation="quick_gelu",
    )


def open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """OpenCLIP ViT-bigG's config as transformers has it. Raises `MissingKeyError` as `unet_config`."""
    vocabulary, width = (_dim(shapes, "token_embedding.weight", i) for i in (0, 1))
    return _text_config(
        vocabulary,
        width,
        positions=_dim(shapes, "positional_embedding", 0),
        layers=_LAYERS.get(width) or _numbered(shapes, "transformer.resblocks."),
        inner=_dim(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 0),
        projection=_dim(shapes, "text_projection", 1),
        activation="gelu",
    )


def _text_config(
    vocabulary: int, width: int, *, positions: int, layers: int, inner: int, projection: int, activation: str
) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": positions,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // _HEAD, 1),
        "intermediate_size": inner,
        "projection_dim": projection,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


CONFIGS_FROM = {
    "unet": unet_config,
    "vae": vae_config,
    "text_encoder": clip_config,
    "text_encoder_2": open_clip_config,
}


def _dim(shapes: Shapes, key: str, index: int) -> int:
    shape = shapes.get(key, ())
    if len(shape) <= index:
        raise MissingKeyError(key)
    return shape[index]


def _numbered(shapes: Shapes, prefix: str) -> int:
    """Count of consecutive numbers, from 0, that follow a prefix."""
    numbers = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count
