"""The forward diffusion process of the model being trained: noisy latents and the UNet's target.

    x_t    = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε
    target = ε                               (epsilon-prediction)
           = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0     (v-prediction)

The schedule itself is diffusers' `DDPMScheduler`, built from the pipeline's own scheduler config.
"""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from mapo_fast.model_configs import check_schedule


class Diffusion:
    """Noise schedule and prediction target of one pipeline.

    Args:
        scheduler_config: the pipeline's `scheduler_config.json`, with any override already merged in.

    Raises:
        UserError: as `check_schedule`.
    """

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        schedule = check_schedule(
            {"_class_name": "DDPMScheduler", **scheduler_config}, "scheduler_config.json"
        )
        self.scheduler = DDPMScheduler(**schedule.model_dump(exclude_none=True))
        self.v_prediction = schedule.prediction_type == "v_prediction"
        self.num_train_timesteps = int(self.scheduler.config.num_train_timesteps)

    def add_noise(
        self,
        latents: Tensor,  # (N, C, h, w) fp32
        noise: Tensor,  # (N, C, h, w) fp32
        timesteps: Tensor,  # (N,) int64
    ) -> Tensor:
        """Noisy latents x_t, (N, C, h, w)."""
        return self.scheduler.add_noise(latents, noise, timesteps)  # type: ignore[no-any-return]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict, (N, C, h, w)."""
        if self.v_prediction:
            return self.scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]
        return noise
