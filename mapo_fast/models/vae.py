"""The scale of a VAE's latents; how much memory it works in, and how to make it less.

The largest feature maps of SDXL's VAE have the image's own height and width. Per pixel, without gradients,

    encode   5 maps of the first block's width     2.5 GiB for one image at 1024² in fp32, 10 GiB for four
    decode   3 maps of the second block's width    3.0 GiB

(traced on fake tensors, `tests/models/test_vae.py`). In tiles of 512 × 512 pixels that overlap by a quarter
it takes 0.64 and 0.76 GiB. But a tile's group norms see the tile alone, so results differ, most for tiles
with little in them. Encode training data image by image instead, which changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mapo_fast.settings.schema import DataConfig

TILE = 512
"""Side of a tile in pixels. diffusers' own choice is the VAE's sample size, which is 1024 for SDXL."""


def to_unet(mean: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A posterior's mean, (N, C, h, w), as SDXL's UNet expects latents.

    mean × scaling_factor, or, where the config has latents_mean and latents_std, (mean − latents_mean) ×
    scaling_factor / latents_std: the inverse of what diffusers' SDXL pipelines do before decoding.

    Args:
        config: the VAE's.
    """
    shift, spread = _statistics(mean, config)
    return (mean - shift) / spread * _factor(config)


def from_unet(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The VAE's input for decoding, from the UNet's latents: the inverse of `to_unet`."""
    shift, spread = _statistics(latents, config)
    return latents / _factor(config) * spread + shift


def _factor(config: Mapping[str, Any]) -> float:
    return float(config.get("scaling_factor", 0.18215))


def _statistics(latents: Tensor, config: Mapping[str, Any]) -> tuple[Tensor | float, Tensor | float]:
    """Mean and spread by channel, (C, 1, 1) each; 0 and 1 where the config has none."""
    found = [config.get(f"latents_{name}") for name in ("mean", "std")]
    if found[0] is None or found[1] is None:
        return 0.0, 1.0
    mean, std = (torch.tensor(v, dtype=latents.dtype, device=latents.device).view(-1, 1, 1) for v in found)
    return mean, std


def use_tiles(vae: Any, side: int = TILE) -> Any:
    """Encode and decode images larger than `side` × `side` pixels in overlapping tiles; returns the VAE."""
    vae.enable_tiling()
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae


def encode_bytes(config: dict[str, Any], pixels: int, itemsize: int) -> int:
    """Peak bytes of encoding `pixels` at once (all images of a batch, or one tile), without the weights.

    Args:
        config: the VAE's config.
        pixels: height × width × images.
        itemsize: bytes per number.
    """
    return 5 * int(config["block_out_channels"][0]) * pixels * itemsize


def decode_bytes(config: dict[str, Any], pixels: int, itemsize: int) -> int:
    """Peak bytes of decoding `pixels` of images at once, without the weights; arguments as `encode_bytes`."""
    return 3 * int(config["block_out_channels"][1]) * pixels * itemsize


def encoding_with_less(data: DataConfig) -> list[dict[str, Any]]:
    """Settings for encoding with less and less memory: image by image, which changes nothing, then tiles."""
    found, settings = [], {}
    for name, value, less in (
        ("batch_size", 1, data.batch_size > 1),
        ("vae_tiling", True, not data.vae_tiling and data.resolution > TILE),
    ):
        if less:
            settings[name] = value
            found.append(dict(settings))
    return found


def setting_text(settings: dict[str, Any]) -> str:
    """`data.batch_size = 1 and data.vae_tiling = true`."""
    return " and ".join(f"data.{name} = {json.dumps(value)}" for name, value in settings.items())
