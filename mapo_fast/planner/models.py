"""Which UNet and VAE are planned for: a model's, or SDXL's by name."""

from __future__ import annotations

from typing import Any

from mapo_fast.models.full_size import SDXL_UNET, sdxl_parts
from mapo_fast.models.open import open_model
from mapo_fast.models.start import read_start, with_start
from mapo_fast.planner.stages import SDXL_VAE, Vae, vae_of
from mapo_fast.settings.given import user_path
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError


def parts_of(model: str, config: Config) -> tuple[Config, dict[str, Any], Vae]:
    """The UNet's config and the VAE of "sdxl", or of a model, of which no weights are needed.

    The config comes back with the rank and the layers of `adapter.start`.

    Args:
        config: for another VAE's folder, and the noise schedule that `[train]` states.

    Raises:
        UserError: it is no SDXL model.
    """
    if model.lower() == "sdxl":
        parts = sdxl_parts()
        return with_start(config, read_start(config, parts), parts["unet"]), SDXL_UNET, SDXL_VAE
    try:
        folder = open_model(config, user_path("--model", model), weights=False)
        config = with_start(config, folder.start, folder.parts["unet"])
        return config, folder.config("unet"), vae_of(folder)
    except UserError as error:
        raise UserError(f"{error}; without a model: --model sdxl") from None
