"""The question of `mapo-fast plan`: the settings to plan for, and the command that trains with them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mapo_fast.planner.report import Run, run_of
from mapo_fast.settings.load import load_config
from mapo_fast.settings.schema import Config


def question(
    config: Path | None, preset: str | None, overrides: Sequence[str], model: str | None
) -> tuple[Config, Run]:
    """The settings of a config, of a preset or of both, and the run that has them.

    A plan needs no data, and no model but `model`: the config may leave them out.

    Args:
        preset: without it and a config, `full` where `adapter.kind=full` is among the overrides, else `lora`.
        model: what the command names as its model.
    """
    if config is None and preset is None:
        preset = "full" if "adapter.kind=full" in overrides else "lora"
    if config is None and model is None:
        model = "sdxl"
    assumed = ["data.source=PAIRS", *([] if model is None else [f"model.path={model}"])]
    settings = load_config(config, [*assumed, *overrides], preset=preset)
    words = ["mapo-fast", "train", *([] if config is None else [str(config)])]
    words += [] if preset is None else ["--preset", preset]
    if model is not None:
        words += ["--model", "MODEL.safetensors" if model.lower() == "sdxl" else model]
    words += [] if config is not None else ["--data", "PAIRS"]
    for override in overrides:
        words += [] if override in ("adapter.kind=full", "adapter.kind=lora") else ["--set", override]
    return settings, run_of(settings, shlex.join(words), preset)
