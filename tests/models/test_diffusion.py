"""Noisy latents and targets follow their formulas; a schedule that cannot be trained is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mapo_fast.models.diffusion import Diffusion
from mapo_fast.util.errors import UserError

SDXL: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def _alpha_bar(zero_snr: bool = False) -> torch.Tensor:
    """ᾱ_t from the definition, in fp64; zero terminal SNR as in arXiv 2305.08891, algorithm 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_the_formulas(prediction: str, zero_snr: bool) -> None:
    process = Diffusion({**SDXL, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr})
    steps = torch.tensor([0, 250, 700, 999])
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    a = _alpha_bar(zero_snr)[steps].sqrt().view(-1, 1, 1, 1)
    s = (1 - _alpha_bar(zero_snr)[steps]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        process.add_noise(latents, noise, steps).double(), a * latents + s * noise, atol=2e-5, rtol=0
    )
    expected = noise.double() if prediction == "epsilon" else a * noise - s * latents
    torch.testing.assert_close(process.target(latents, noise, steps).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR with epsilon-prediction cannot work"),
        ({"beta_schedule": "wiggly"}, "beta_schedule = 'wiggly': set one of linear"),
        ({"prediction_type": "sample"}, "prediction_type = 'sample', which cannot be trained"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Diffusion({**SDXL, **change})
