"""Sampling with diffusers' own SDXL pipeline, from prompt embeddings that are already there.

No text encoder is needed and the VAE only to decode. The sampler is diffusers' Euler scheduler with the
pipeline's own scheduler config (epsilon and v-prediction, zero terminal SNR); it is deterministic, and every
sample's start noise comes from a generator of its own seed, so that image i depends on its prompt and its
seed alone, never on how many samples were asked for or how they were split into batches (up to the last
bits of a matrix product, which depend on the batch size).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import LATENT, sampling_pipeline
from mapo_fast.models.vae import from_unet
from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mapo_fast.models.text import PromptEmbeds


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
    batch_size: int = 8,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample one latent per prompt.

    Args:
        unet: `UNet2DConditionModel`, on any device; it is put into eval mode for the call and back after it.
        folder: the pipeline folder, for its scheduler config and VAE scale.
        prompts: embeddings of N prompts: (N, S, D) and (N, P).
        empty: embeddings of the unconditional prompt: (1, S, D) and (1, P).
        seeds: N seeds of start noise, drawn in fp32 on the CPU.
        height: image height in pixels, a multiple of 8.
        width: image width in pixels, a multiple of 8.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less switches guidance off.
        batch_size: samples denoised together.
        poll: called after each denoising step; what it raises ends the sampling.

    Returns:
        Latents (N, C, h, w) as in training, which `decode_latents` takes; fp32, on the CPU.

    Raises:
        ValueError: numbers of prompts and seeds differ, or a side is not a multiple of 8.
        UserError: the scheduler's config cannot be used for sampling.
    """
    count = prompts.prompt_embeds.shape[0]
    if len(seeds) != count:
        raise ValueError(f"{count} prompts need {count} seeds, got {len(seeds)}")
    if height % LATENT or width % LATENT:
        raise ValueError(f"height and width must be multiples of {LATENT}, got {height}×{width}")
    scale = 2 ** (len(folder.config("vae")["block_out_channels"]) - 1)
    shape = (unet.config.in_channels, height // scale, width // scale)
    pipeline = _pipeline(folder, unet, steps)
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
            noise = torch.stack(
                [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds[part]]
            )
            with _quiet_arrays():
                latents = pipeline(
                    prompt_embeds=prompts.prompt_embeds[part].to(device, dtype),
                    pooled_prompt_embeds=prompts.pooled_embeds[part].to(device, dtype),
                    negative_prompt_embeds=empty.prompt_embeds.to(device, dtype).expand(size, -1, -1),
                    negative_pooled_prompt_embeds=empty.pooled_embeds.to(device, dtype).expand(size, -1),
                    latents=noise.to(device, dtype),
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
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


def sampler(folder: Pipeline, steps: int) -> Any:
    """diffusers' Euler scheduler with the pipeline's own scheduler config, set to this many steps.

    Raises:
        UserError: the config cannot be used for sampling; diffusers finds some errors only while it samples.
    """
    from diffusers import EulerDiscreteScheduler

    config = dict(folder.scheduler_config)
    if config.get("rescale_betas_zero_snr"):
        config["timestep_spacing"] = "trailing"  # only then the first step is at zero SNR (arXiv 2305.08891)
    try:
        scheduler = EulerDiscreteScheduler.from_config(config)
        with _quiet_arrays():
            scheduler.set_timesteps(steps)
    except Exception as error:  # of any kind: diffusers takes the fields as they are
        raise UserError(
            f"{folder.scheduler.where} cannot be sampled by in {steps} steps: "
            f"{(str(error).splitlines() or [''])[0]}; copy the file from the model again, or set another "
            "preview.steps"
        ) from error
    return scheduler


def _pipeline(folder: Pipeline, unet: Any, steps: int) -> Any:
    pipeline = sampling_pipeline(unet, sampler(folder, steps))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _quiet_arrays() -> Iterator[None]:
    """Hide numpy 2's warning about how diffusers' Euler scheduler turns a tensor into an array."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield
