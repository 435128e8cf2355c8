"""The LoRA that a run goes on from: `adapter.start`.

Its part for the UNet is what is trained; its part for the text encoders is applied while prompts are encoded
and goes unchanged into what the run writes. Rank, alpha and layers are the file's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mapo_fast.models.lora_file import LoraFile, LoraLayer, read_lora
from mapo_fast.models.parts import Part
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError

_LARGEST = 2048
"""The largest rank that a config may have."""


def read_start(config: Config, parts: Mapping[str, Part]) -> LoraFile | None:
    """The LoRA that `adapter.start` names, with factors that can be trained.

    Raises:
        UserError: the LoRA cannot be read, has nothing for the UNet, or has factors that cannot be trained.
    """
    if config.adapter.start is None:
        return None
    try:
        lora = read_lora(config.adapter.start, parts)
    except UserError as error:
        raise UserError(f"adapter.start cannot be used: {error}") from None
    layers = lora.parts.get("unet", {})
    if not layers:
        raise UserError(
            f"adapter.start = {lora.path} has no factors for the UNet, so there is nothing to train: name it "
            "as model.lora"
        )
    for name, layer in layers.items():
        if layer.scale <= 0 or layer.rank > _LARGEST:
            raise UserError(
                f"adapter.start = {lora.path} has rank {layer.rank} and alpha {alpha_of(layer):g} for "
                f"{name}: only ranks up to {_LARGEST} with alpha above 0 can be trained; merge it as "
                "model.lora"
            )
    return lora


def alpha_of(layer: LoraLayer) -> float:
    """A layer's alpha, without the rounding error of the division."""
    return float(f"{layer.scale * layer.rank:.12g}")


def with_start(config: Config, lora: LoraFile | None, unet: Part) -> Config:
    """The config with the LoRA's rank, alpha and targets; where ranks differ, the largest.

    Raises:
        UserError: the config sets other values.
    """
    if lora is None:
        return config
    layers = lora.parts["unet"]
    widest = max(layers.values(), key=lambda layer: layer.rank)
    targets = _targets(
        layers, (n.removesuffix(".weight") for n, s in unet.shapes.items() if len(s) in (2, 4))
    )
    has: dict[str, Any] = {"rank": widest.rank, "alpha": alpha_of(widest), "targets": targets}
    for key, of_layers in (
        ("rank", {layer.rank for layer in layers.values()}),
        ("alpha", {alpha_of(layer) for layer in layers.values()}),
        ("targets", {tuple(targets)}),
    ):
        stated = getattr(config.adapter, key)
        if f"adapter.{key}" in config.stated and of_layers != {stated}:
            raise UserError(
                f"adapter.{key} = {stated!r}, but adapter.start = {lora.path} has {_listed(of_layers)}: "
                f"leave adapter.{key} out"
            )
    return with_settings(config, {f"adapter.{key}": value for key, value in has.items()}, "start LoRA")


def _listed(values: Iterable[Any]) -> str:
    *others, last = [str(value) for value in sorted(values)]
    return f"{', '.join(others)} and {last}" if others else last


def _targets(layers: Mapping[str, Any], every: Iterable[str]) -> list[str]:
    """The layers as `adapter.targets` names them: by their endings where these match no other layer."""
    endings = sorted({re.split(r"\.(?=[a-z])", name)[-1] for name in layers})
    matched = {name for name in every if any(name == e or name.endswith(f".{e}") for e in endings)}
    return endings if matched == layers.keys() else sorted(layers)
