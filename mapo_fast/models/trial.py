"""Call the models that configs describe once, on tensors without data: takes a second and no memory.

diffusers checks a config in many ways while it builds a model, and some of it only in a call.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

import torch

from mapo_fast.models.sdxl import CONTEXT, TIME_IDS, encode_text, predict

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a model's weights, by name."""


@lru_cache
@torch.no_grad()
def try_unet(config: str, text_width: int, pooled_width: int) -> Shapes:
    """Build the UNet and give it what a training step gives it; returns its weights' shapes.

    Args:
        config: its config as JSON.
        text_width: width of the prompt embeddings.
        pooled_width: width of the pooled embedding.

    Raises:
        Exception: of any kind.
    """
    from diffusers import UNet2DConditionModel

    fields = json.loads(config)
    side = 2 ** len(fields["down_block_types"])
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(fields)
        latents = torch.empty(1, fields.get("in_channels", 4), side, side)
        text, pooled = torch.empty(1, CONTEXT, text_width), torch.empty(1, pooled_width)
        out = predict(unet, latents, torch.zeros(1), text, pooled, torch.empty(1, TIME_IDS))
    if out.shape != latents.shape:
        raise ValueError(f"it makes {tuple(out.shape[1:])} of latents {tuple(latents.shape[1:])}")
    return _shapes(unet)


@lru_cache
@torch.no_grad()
def try_vae(config: str) -> Shapes:
    """Build the VAE, encode an image and decode it; returns its weights' shapes.

    Args:
        config: its config as JSON.

    Raises:
        Exception: of any kind.
    """
    from diffusers import AutoencoderKL

    fields = json.loads(config)
    factor = 2 ** (len(fields["block_out_channels"]) - 1)
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(fields)
        latents = vae.encode(torch.empty(1, 3, 2 * factor, 2 * factor)).latent_dist.mode()
        out = vae.decode(latents).sample
    if latents.shape[1:] != (fields["latent_channels"], 2, 2) or out.shape[2:] != (2 * factor, 2 * factor):
        raise ValueError(f"it makes latents {tuple(latents.shape[1:])} of {2 * factor} × {2 * factor} pixels")
    return _shapes(vae)


@lru_cache
@torch.no_grad()
def try_text_encoder(config: str, which: Literal[1, 2]) -> Shapes:
    """Build a text encoder and encode a prompt; returns its weights' shapes.

    Args:
        config: the fields of `configs.TextConfig` as JSON.
        which: 1 is a `CLIPTextModel`, 2 a `CLIPTextModelWithProjection`.

    Raises:
        Exception: of any kind.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModel if which == 1 else CLIPTextModelWithProjection
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(**json.loads(config)))
        encode_text(encoder, torch.zeros(1, CONTEXT, dtype=torch.long), which)
    return _shapes(encoder)


def _shapes(model: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
