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

from mapo_fast.errors import UserError


class Diffusion:
    """Noise schedule and prediction target of one pipeline.

    Args:
        scheduler_config: the pipeline's `scheduler_config.json`, with any override already merged in.

    Raises:
        UserError: a prediction type the trainer does not know, or zero terminal SNR with epsilon-prediction.
    """

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        prediction = scheduler_config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(
                f"scheduler prediction_type = {prediction!r} cannot be trained; set train.prediction to "
                "'epsilon' or 'v_prediction'"
            )
        if scheduler_config.get("rescale_betas_zero_snr") and prediction == "epsilon":
            raise UserError(
                "zero terminal SNR with epsilon-prediction cannot work: at the last timestep the input is "
                "pure noise (set train.prediction = 'v_prediction' or train.zero_terminal_snr = 'off')"
            )
        try:
            self.scheduler = DDPMScheduler.from_config(scheduler_config)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"scheduler_config.json cannot be used: {error}") from None
        self.v_prediction = prediction == "v_prediction"
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
