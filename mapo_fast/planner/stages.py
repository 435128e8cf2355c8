"""Device memory of a run's stages other than the training step, which a plan is about.

    prepare      before training: the VAE in fp32 with data.batch_size images, or one tile of each, in it
    previews     what lies on the device between steps, the VAE in fp32, and one tile decoded
    validation   a forward pass of the step's own micro-batch without gradients: less than the step; with
                CUDA graphs in addition to their buffers, and so within the plan
    saving       one tensor after the other goes to the host: nothing

Sampling a preview is a forward pass of two images without gradients: less than a pair's step. A text encoder
that the GPU has no room for runs on the CPU (`preview.py`, `data/prepare.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.vae import TILE, decode_bytes, encode_bytes, encoding_with_less, setting_text
from mapo_fast.planner.plan import GRAPHS, Plan
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.util.sizes import GIB

FP32 = 4


class Vae(NamedTuple):
    """An image autoencoder."""

    config: dict[str, Any]
    nbytes: int
    """Bytes of its weights in fp32."""


SDXL_VAE = Vae({"block_out_channels": [128, 256, 512, 512]}, FP32 * 83_653_863)


def vae_of(folder: Pipeline) -> Vae:
    """The VAE of a pipeline folder, by its config; SDXL's own where it is no other."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(folder.config("vae"))
    found = Vae(folder.config("vae"), FP32 * sum(p.numel() for p in vae.parameters()))
    widths = "block_out_channels"
    same = found.nbytes == SDXL_VAE.nbytes and list(found.config[widths]) == SDXL_VAE.config[widths]
    return SDXL_VAE if same else found


def preparing(config: Config, vae: Vae) -> int:
    """Peak bytes of `mapo-fast prepare`'s VAE."""
    side = min(config.data.resolution, TILE) if config.data.vae_tiling else config.data.resolution
    return vae.nbytes + encode_bytes(vae.config, config.data.batch_size * side**2, FP32)


def how_to_prepare(config: Config, vae: Vae, usable: int) -> str:
    """Settings with which `mapo-fast prepare` fits; empty where it fits as configured."""
    need = preparing(config, vae)
    if need <= usable:
        return ""
    for settings in encoding_with_less(config.data):
        need = preparing(with_settings(config, {f"data.{k}": v for k, v in settings.items()}), vae)
        if need <= usable:
            tiled = ", but tiles change the latents" if "vae_tiling" in settings else ""
            return f"prepare fits with {setting_text(settings)}: {need / GIB:.2f} GiB{tiled}"
    return "prepare does not fit on this card: run it on the CPU (CUDA_VISIBLE_DEVICES=) or another machine"


def previewing(config: Config, plan: Plan, vae: Vae) -> int:
    """Peak bytes while a preview is decoded."""
    between = sum(plan.device.get(name, 0) for name in ("parameters", "states", "staging", GRAPHS))
    side = min(config.data.resolution, TILE)
    return between + vae.nbytes + decode_bytes(vae.config, side**2, FP32)
