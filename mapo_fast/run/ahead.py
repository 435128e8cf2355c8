"""Checks of a run that need no torch: paths, the data's layout, cache, run folder.

`fit` and `prepare` check all of it again, with what only the model itself can tell.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mapo_fast.data.given import check_confirmed, given_data
from mapo_fast.data.index import CacheIndex, difference, read_index
from mapo_fast.data.sources.base import PreferencePairs
from mapo_fast.run.folder import check_output, check_stated, read_run
from mapo_fast.settings.loras import parse_lora
from mapo_fast.settings.schema import Config, ObjectiveConfig
from mapo_fast.settings.table import affecting
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import exclusive
from mapo_kernels.objectives import OBJECTIVES


def check_train(config: Config, *, resume: bool, yes: bool = False) -> bool:
    """Check everything that a run needs; nothing is written.

    Args:
        config: the settings.
        resume: a run is continued.
        yes: a person has confirmed the pairs.

    Returns:
        Whether the cache has to be prepared first: it is not finished, or there are other data by now. That
        of a run that is continued stays as it is.

    Raises:
        UserError: what is wrong.
    """
    output = config.train.output
    if resume:
        if (before := read_run(output)) is not None:
            check_stated(config, before)
    else:
        check_output(config, {}, resume=False)
    _check_free(output)
    _check_free(config.data.cache)
    _check_model(config)
    index = read_index(config.data.cache)
    if index is None and config.data.source is None:
        CacheIndex.open(config.data.cache)  # says what is missing
    source = None if config.data.source is None else given_data(config.data)
    if index is not None:
        _check_cache(config, index["settings"])
    if index is None or (source is not None and not resume and not _is_of(source, index, config)):
        assert source is not None
        check_kind(config.objective, source.paired, f"data.source {config.data.source}")
        check_confirmed(source, yes=yes)
        return True
    check_kind(config.objective, index.get("paired", True), f"data.cache {config.data.cache}")
    CacheIndex.open(config.data.cache)
    return False


def check_prepare(config: Config, *, yes: bool = False) -> None:
    """Check everything that `prepare` needs; nothing is written.

    Args:
        config: the settings.
        yes: a person has confirmed the pairs.

    Raises:
        UserError: what is wrong.
    """
    _check_model(config)
    source = given_data(config.data)
    _check_free(config.data.cache)
    if (index := read_index(config.data.cache)) is not None:
        _check_cache(config, index["settings"])
    if index is None or not _is_of(source, index, config):
        check_confirmed(source, yes=yes)


def check_kind(objective: ObjectiveConfig, paired: bool, what: str) -> None:
    """Check that an objective learns from the kind of data: pairs, or single images.

    Raises:
        UserError: it does not; `what` names the data.
    """
    if (objective.known.samples == "pair") == paired:
        return
    wants, has = "pairs (chosen, rejected)", "single labelled images (image, label)"
    others = [repr(name) for name, known in OBJECTIVES.items() if known.samples == "single"]
    other = f"objective.name = {' or '.join(others)}"
    if paired:
        wants, has, other = has, wants, "another objective.name"
    raise UserError(
        f"objective.name = {objective.name!r} learns from {wants}, {what} holds {has}: use {other}, or "
        "prepare another data.source into another data.cache"
    )


def _is_of(source: PreferencePairs, index: dict[str, Any], config: Config) -> bool:
    """Whether a finished cache is of these data as they are now, split as the config says."""
    return (index["source"], index["held_out"]) == (source.identity(), config.data.held_out)


def _check_cache(config: Config, have: dict[str, Any]) -> None:
    """Check the settings that a finished cache was made for, the model's part aside."""
    want = {**have, **{row.key: getattr(config.data, row.key) for row in affecting("cache")}}
    if reason := difference(have, want):
        raise UserError(
            f"data.cache {config.data.cache} {reason}: set it back, or choose another cache with "
            "--set data.cache=FOLDER"
        )


def _check_model(config: Config) -> None:
    """Check that the files in `[model]` and `adapter.start` exist."""
    model = config.model
    whole = "must be a diffusers SDXL pipeline folder or a single .safetensors file"
    named = [
        ("model", model.path, f"model.path {whole}"),
        ("model", model.base, f"model.base {whole}"),
        ("model.unet", model.unet, "it must be a diffusers UNet folder, or a .safetensors file"),
        ("model.vae", model.vae, "it must be a diffusers VAE folder, or a .safetensors file"),
        ("adapter.start", config.adapter.start, "it must be a LoRA's file"),
        *(("LoRA", parse_lora("model.lora", text).path, "see model.lora") for text in model.lora),
    ]
    for name, path, remedy in named:
        if path is not None and not os.path.lexists(path):
            raise UserError(f"{name} not found: {path} ({remedy})")


def _check_free(folder: Path) -> None:
    """Check that no other process holds a folder."""
    if (folder / ".lock").is_file():
        with exclusive(folder):
            pass
