"""The settings that a trace depends on, and those that a plan depends on."""

from __future__ import annotations

from typing import Any

from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import planned

_TRAIN = {"pairs_per_batch", "accumulation", "precision", "layout", "gradient_checkpointing", "fused_step"}
_TRAIN |= {"attention"}
_NUMBERS = {
    "objective": {
        "reading",
        "beta",
        "snr",
        "gamma",
        "alpha",
        "eta",
        "desirable_weight",
        "undesirable_weight",
    },
    "adapter": {"alpha"},
    "optim": {"lr", "betas", "eps", "schedule", "warmup_steps"},
}
"""Settings that change results and no operation, by section."""
_SWITCHES = ("weight_decay", "max_grad_norm", "max_update_rms")
"""Numbers of `[optim]` of which only zero or none changes the operations."""


def traced_settings(config: Config) -> dict[str, Any]:
    """The settings that a traced step depends on."""
    table = config.model_dump(mode="json", include={"adapter", "objective", "offload", "optim"})
    for section, names in _NUMBERS.items():
        table[section] = {key: value for key, value in table[section].items() if key not in names}
    for name in _SWITCHES:
        table["optim"][name] = bool(table["optim"][name])
    table["train"] = config.train.model_dump(mode="json", include=_TRAIN)
    table["train"]["accumulation"] = min(2, config.train.accumulation)  # what follows is like the second
    table["speed"] = config.speed.model_dump(mode="json", include={"fused_ops", "channels_last", "fp8"})
    table["data"] = config.data.model_dump(mode="json", include={"resolution", "max_tokens"})
    return table


def planned_settings(config: Config) -> dict[str, Any]:
    """The settings that a plan depends on: traced ones, fixed ones, and those of the other stages."""
    table = traced_settings(config)
    table["accumulation"] = config.train.accumulation
    table["data"] |= config.data.model_dump(mode="json", include={"batch_size", "vae_tiling"})
    table["previews"] = bool(config.preview.prompts)
    table["graphs"] = config.speed.cuda_graph
    table["reference"] = config.reference
    if config.ema.half_life is not None:
        table["ema"] = config.ema.every
    table["stated"] = sorted(config.stated & {*planned("exact"), *planned("last")})
    return table
