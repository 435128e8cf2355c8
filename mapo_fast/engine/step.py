"""One micro-batch through the UNet, the loss and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_fast.data.cache import CachedPair, PairBatch, PairCache, SampleBatch
from mapo_fast.engine.draws import pair_drop, pair_flip, pair_noise, pair_timestep
from mapo_fast.models import sdxl
from mapo_fast.models.diffusion import Diffusion


class PairInputs(NamedTuple):
    """Inputs of the UNet for B pairs: 2B samples, chosen half first; or 2B single samples."""

    noisy: Tensor  # (2B, C, h, w) fp32
    timesteps: Tensor  # (2B,) int64
    prompt_embeds: Tensor  # (2B, S, D)
    pooled_embeds: Tensor  # (2B, P)
    time_ids: Tensor  # (2B, 6) fp32
    target: Tensor  # (2B, C, h, w) fp32


def training_inputs(
    cache: PairCache,
    pairs: Sequence[CachedPair],
    diffusion: Diffusion,
    *,
    seed: int,
    epoch: int,
    caption_dropout: float,
    device: torch.device,
) -> PairInputs:
    """Inputs of one micro-batch, every draw a function of (seed, epoch, pair id).

    Each single image has its own id and therefore its own draws.
    """
    flip = [pair_flip(seed, epoch, p.id) for p in pairs] if cache.flips else None
    drop = [pair_drop(seed, epoch, p.id, caption_dropout) for p in pairs] if caption_dropout else None
    batch = (cache.batch if cache.paired else cache.samples)(pairs, flip=flip, drop=drop)
    latents = batch.chosen_latents if isinstance(batch, PairBatch) else batch.latents
    noise = torch.stack([pair_noise(seed, epoch, p.id, tuple(latents.shape[1:])) for p in pairs])
    steps = torch.tensor([pair_timestep(seed, epoch, p.id, diffusion.num_train_timesteps) for p in pairs])
    if isinstance(batch, PairBatch):
        return pair_inputs(batch, noise, steps, diffusion, device)
    return sample_inputs(batch, noise, steps, diffusion, device)


def pair_inputs(
    batch: PairBatch,
    noise: Tensor,  # (B, C, h, w) fp32, shared within the pair
    timesteps: Tensor,  # (B,) int64, shared within the pair
    diffusion: Diffusion,
    device: torch.device,
) -> PairInputs:
    """Noise both halves of a batch with the pair's own noise and timestep, and move them to the device."""

    def twice(shared: Tensor) -> Tensor:
        return torch.cat([shared, shared])

    samples = SampleBatch(
        latents=torch.cat([batch.chosen_latents, batch.rejected_latents]),
        prompt_embeds=twice(batch.prompt_embeds),
        pooled_embeds=twice(batch.pooled_embeds),
        time_ids=torch.cat([batch.time_ids_chosen, batch.time_ids_rejected]),
    )
    return sample_inputs(samples, twice(noise), twice(timesteps), diffusion, device)


def sample_inputs(
    batch: SampleBatch,
    noise: Tensor,  # (n, C, h, w) fp32
    timesteps: Tensor,  # (n,) int64
    diffusion: Diffusion,
    device: torch.device,
) -> PairInputs:
    """Noise n samples, each with its own noise and timestep, and move them to the device."""
    latents = upload(batch.latents, device).float()
    noise, timesteps = upload(noise, device), upload(timesteps, device)
    return PairInputs(
        noisy=diffusion.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        prompt_embeds=upload(batch.prompt_embeds, device),
        pooled_embeds=upload(batch.pooled_embeds, device),
        time_ids=upload(batch.time_ids, device),
        target=diffusion.target(latents, noise, timesteps),
    )


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the host does not wait for the copy."""
    if device.type == "cuda":  # only from pinned memory does the copy not wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def predict(unet: Any, inputs: PairInputs) -> Tensor:
    """The UNet's prediction for both halves, (2B, C, h, w)."""
    given = (inputs.noisy, inputs.timesteps, inputs.prompt_embeds, inputs.pooled_embeds, inputs.time_ids)
    return sdxl.predict(unet, *given)


def sample_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared errors of n samples, whichever half they are of: (n,) in fp32 or the target's fp64."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
