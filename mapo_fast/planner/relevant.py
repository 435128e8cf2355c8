"""The settings that a trace depends on, and those that a plan depends on."""

from __future__ import annotations

from typing import Any

from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import planned

_TRAIN = {"pairs_per_batch", "accumulation", "precision", "layout", "gradient_checkpointing", "fused_step"}
_TRAIN |= {"attention"}


def traced_settings(config: Config) -> dict[str, Any]:
    """The settings that a traced step depends on."""
    table = config.model_dump(mode="json", include={"adapter", "objective", "offload", "optim"})
    table["train"] = config.train.model_dump(mode="json", include=_TRAIN)
    table["optim"].pop("lr")
    table["speed"] = config.speed.model_dump(mode="json", include={"fused_ops", "channels_last", "fp8"})
    table["data"] = config.data.model_dump(mode="json", include={"resolution", "max_tokens"})
    return table


def planned_settings(config: Config) -> dict[str, Any]:
    """The settings that a plan depends on: traced ones, fixed ones, and those of the other stages."""
    table = traced_settings(config)
    table["data"] |= config.data.model_dump(mode="json", include={"batch_size", "vae_tiling"})
    table["previews"] = bool(config.preview.prompts)
    table["graphs"] = config.speed.cuda_graph
    table["reference"] = config.reference
    table["stated"] = sorted(config.stated & {*planned("exact"), *planned("last")})
    return table
