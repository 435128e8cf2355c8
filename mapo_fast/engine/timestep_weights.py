"""Weights of a pair's whole loss by its timestep, for any objective.

min_snr   min(snr, γ) / snr for ε-prediction, min(snr, γ) / (snr + 1) for v-prediction (arXiv 2303.09556,
          eq. of the weights for both targets), with snr(t) = ᾱ_t / (1 − ᾱ_t)
a table   W numbers for W equal parts of the timesteps, from little noise to much
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_fast.models.diffusion import Diffusion
from mapo_fast.settings.schema import TrainConfig


def timestep_weights(config: TrainConfig, diffusion: Diffusion, device: torch.device) -> Tensor | None:
    """(T,) fp32 weights of the T timesteps; None where all are 1."""
    kind, count = config.timestep_weights, diffusion.num_train_timesteps
    if kind == "none":
        return None
    if kind != "min_snr":
        numbers = torch.tensor(kind, dtype=torch.float32)
        return numbers[torch.arange(count) * len(numbers) // count].to(device)
    alphas: Tensor = diffusion.scheduler.alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    capped = snr.clamp(max=config.min_snr_gamma)
    # of pure noise, which v-prediction alone has, the snr is 0, and so is the weight
    weights: Tensor = capped / (snr + 1 if diffusion.v_prediction else snr)
    return weights.float().to(device)
