"""The UNet and VAE to plan for: a model's, or SDXL's by name."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import UNet2DConditionModel

from mapo_fast.models.full_size import SDXL_UNET, sdxl_parts
from mapo_fast.models.open import open_model
from mapo_fast.models.pipeline import Pipeline
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
        UserError: not an SDXL model.
    """
    if model.lower() == "sdxl":
        parts = sdxl_parts()
        return with_start(config, read_start(config, parts), parts["unet"]), SDXL_UNET, SDXL_VAE
    try:
        folder = open_model(config, user_path("--model", model), weights=False)
        config = with_start(config, folder.start, folder.parts["unet"])
        return config, unet_of(folder), vae_of(folder)
    except UserError as error:
        raise UserError(f"{error}; without a model: --model sdxl") from None


def unet_of(folder: Pipeline) -> dict[str, Any]:
    """The config of a model's UNet; SDXL's own if they are equivalent, so that such models share traces."""
    unet = folder.config("unet")
    return SDXL_UNET if _in_full(unet) == _in_full(SDXL_UNET) else unet


def _in_full(unet: dict[str, Any]) -> dict[str, Any]:
    """Everything that a UNet is built from, with defaults and without the image size."""
    known = {p.name: p.default for p in inspect.signature(UNet2DConditionModel.__init__).parameters.values()}
    found = {name: unet.get(name, known[name]) for name in known if name not in ("self", "sample_size")}
    return {name: tuple(v) if isinstance(v, list) else v or None for name, v in found.items()}
