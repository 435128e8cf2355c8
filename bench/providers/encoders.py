"""A VAE and two text encoders that encode a step's images and prompts, for recipes without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.providers.task import PAIRS, Task
from mapo_fast.demo.run import TINY_SDXL
from mapo_fast.models.open import open_sdxl

SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SDXL_TEXT: tuple[dict[str, Any], dict[str, Any]] = (
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "vocab_size": 49408,
        "hidden_act": "gelu",
    },
)


class Encoders:
    """Random images and token ids on the host, encoded step by step as the released scripts do.

    Args:
        half: type of the text encoders; the VAE is fp32.
    """

    def __init__(self, task: Task, half: torch.dtype) -> None:
        self.task = task
        self.vae, self.text = _load(task)
        self.vae.to(task.device, torch.float32).requires_grad_(False).eval()
        for encoder in self.text:
            encoder.to(task.device, half).requires_grad_(False).eval()
        self.half = half
        generator = torch.Generator().manual_seed(0)
        shape = (PAIRS, 6, task.resolution, task.resolution)  # chosen and rejected, as the scripts join them
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        vocabulary = self.text[0].config.vocab_size
        self.tokens = torch.randint(0, vocabulary, (PAIRS, 77), generator=generator)

    @torch.no_grad()
    def encode(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (2B, 4, h, w) fp32, prompt states, pooled states and time ids of a step, chosen first."""
        task = self.task
        rows = [(step * task.pairs + i) % PAIRS for i in range(task.pairs)]
        pixels = (self.images[rows].float() / 127.5 - 1).to(task.device)
        pixels = torch.cat(pixels.chunk(2, dim=1))
        latents = torch.cat([self.vae.encode(x).latent_dist.sample() for x in pixels.split(8)])
        tokens = self.tokens[rows].to(task.device)
        states = [encoder(tokens, output_hidden_states=True) for encoder in self.text]
        hidden = torch.cat([s.hidden_states[-2] for s in states], dim=-1)
        size = float(task.resolution)
        ids = torch.tensor([[size, size, 0.0, 0.0, size, size]] * 2 * task.pairs, device=task.device)
        return (
            latents * self.vae.config.scaling_factor,
            hidden.repeat(2, 1, 1),
            states[1][0].repeat(2, 1),
            ids.to(self.half),
        )


def _load(task: Task) -> tuple[Any, list[Any]]:
    """The tiny SDXL's own encoders, or SDXL's with random weights."""
    if task.size == "tiny":
        folder = open_sdxl(TINY_SDXL)
        return folder.load_vae(), [folder.load_text_encoder(1), folder.load_text_encoder(2)]
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with task.device:
        vae = AutoencoderKL(**SDXL_VAE)
        first, second = (CLIPTextConfig(**settings) for settings in SDXL_TEXT)
        return vae, [CLIPTextModel(first), CLIPTextModelWithProjection(second)]
