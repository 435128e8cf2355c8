"""The forward diffusion process of the model being trained: noisy latents and the UNet's target.

    x_t    = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε
    target = ε                               (epsilon-prediction)
           = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0     (v-prediction)

The schedule itself is diffusers' `DDPMScheduler`, built from the pipeline's own scheduler config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from mapo_fast.models.configs import check_schedule
from mapo_fast.util.errors import UserError


class Diffusion:
    """Noise schedule and prediction target of one pipeline.

    Args:
        scheduler_config: the pipeline's `scheduler_config.json`, with any override already merged in.
        where: its file, for messages.

    Raises:
        UserError: the schedule fails `check_schedule`, or a timestep is all image or, with
            epsilon-prediction, all noise.
    """

    def __init__(self, scheduler_config: dict[str, Any], where: Path | str = "scheduler_config.json") -> None:
        schedule = check_schedule({"_class_name": "DDPMScheduler", **scheduler_config}, where)
        self.scheduler = DDPMScheduler(**schedule.model_dump(exclude_none=True))
        self.v_prediction = schedule.prediction_type == "v_prediction"
        if float(self.scheduler.alphas_cumprod[0]) >= 1:
            raise UserError(
                f"{where} has betas so small that timestep 0 has no noise: nothing can be predicted there; "
                "copy the file from the model again"
            )
        if float(self.scheduler.alphas_cumprod[-1]) <= 0 and not self.v_prediction:
            raise UserError(
                f"{where} has betas under which the last timestep is pure noise (zero terminal SNR): "
                "epsilon-prediction cannot work there; set train.prediction to 'v_prediction' if the model "
                "is one of these, or copy the file from the model again"
            )
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
        """The UNet's target, (N, C, h, w)."""
        if self.v_prediction:
            return self.scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]
        return noise
