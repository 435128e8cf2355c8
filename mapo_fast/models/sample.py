"""Sampling with diffusers' own SDXL pipeline, from prompt embeddings that are already there.

No text encoder is needed and the VAE only to decode. Previews, the demo and `mapo-fast sample` all sample
here. The schedulers are diffusers' with the pipeline's own scheduler config (see `schedulers`). All noise of
a sample, at the start and in the steps of a stochastic sampler, comes from a generator of its own seed on the
CPU, so that image i depends on its prompt and its seed alone, never on how many samples were asked for or how
they were split into batches (up to the last bits of a matrix product, which depend on the batch size).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.schedulers import Method, quiet_arrays, scheduler
from mapo_fast.models.sdxl import LATENT, sampling_pipeline
from mapo_fast.models.vae import from_unet

if TYPE_CHECKING:
    from PIL.Image import Image

    from mapo_fast.models.text import PromptEmbeds


def noise_seed(prompt: str, seed: int) -> int:
    """The seed of an image's noise: the first 63 bits of SHA-256 of `SEED`, a line break, and the prompt.

    So a seed gives every model the same noise, and every prompt other noise. Two prompts with equal noise
    would be worth less than two in a comparison.
    """
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def sample_latents(
    unet: Any,
    folder: Pipeline,
    prompts: PromptEmbeds,
    empty: PromptEmbeds,
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int = 25,
    guidance: float = 5.0,
    rescale: float = 0.0,
    method: Method = Method(),  # noqa: B008 - it is immutable
    batch_size: int = 8,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample one latent per prompt.

    Args:
        unet: `UNet2DConditionModel`, on any device; it is put into eval mode for the call and back after it.
        folder: the pipeline folder, for its scheduler config and VAE scale.
        prompts: embeddings of N prompts: (N, S, D) and (N, P).
        empty: embeddings of the unconditional prompt: (1, S, D) and (1, P).
        seeds: N seeds of noise; that of the start is drawn in fp32 on the CPU.
        height: image height in pixels, a multiple of 8.
        width: image width in pixels, a multiple of 8.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less switches guidance off.
        rescale: how far guided predictions get the spread of unguided ones (arXiv 2305.08891), 0 to 1.
        method: sampler and schedule.
        batch_size: samples denoised together.
        poll: called after each denoising step; what it raises ends the sampling.

    Returns:
        Latents (N, C, h, w) as in training, which `decode_latents` takes; fp32, on the CPU.

    Raises:
        ValueError: numbers of prompts and seeds differ, or a side is not a multiple of 8.
        UserError: as `schedulers.scheduler`.
    """
    count = prompts.prompt_embeds.shape[0]
    if len(seeds) != count:
        raise ValueError(f"{count} prompts need {count} seeds, got {len(seeds)}")
    if height % LATENT or width % LATENT:
        raise ValueError(f"height and width must be multiples of {LATENT}, got {height}×{width}")
    scale = 2 ** (len(folder.config("vae")["block_out_channels"]) - 1)
    shape = (unet.config.in_channels, height // scale, width // scale)
    pipeline = sampling_pipeline(unet, scheduler(folder, steps, method))
    pipeline.set_progress_bar_config(disable=True)
    training = unet.training
    unet.eval()
    device, dtype = unet.device, unet.dtype
    done = []

    def step_end(_: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        poll()
        return given

    try:
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            size = part.stop - part.start
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            with quiet_arrays():
                latents = pipeline(
                    prompt_embeds=prompts.prompt_embeds[part].to(device, dtype),
                    pooled_prompt_embeds=prompts.pooled_embeds[part].to(device, dtype),
                    negative_prompt_embeds=empty.prompt_embeds.to(device, dtype).expand(size, -1, -1),
                    negative_pooled_prompt_embeds=empty.pooled_embeds.to(device, dtype).expand(size, -1),
                    latents=noise.to(device, dtype),
                    generator=generators,
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    guidance_rescale=rescale,
                    output_type="latent",
                    callback_on_step_end=step_end,
                ).images
            done.append(latents.float().cpu())
    finally:
        unet.train(training)
    return torch.cat(done)


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, *, batch_size: int = 8) -> list[Image]:
    """Decode latents (N, C, h, w), as the UNet has them, into N RGB images."""
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
    images: list[Image] = []
    for part in torch.split(latents, batch_size):
        decoded = vae.decode(from_unet(part.to(vae.device, vae.dtype), vae.config)).sample
        images.extend(processor.postprocess(decoded.float(), output_type="pil"))
    return images
