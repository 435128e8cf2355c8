"""The final settings of a run, known before anything is loaded: for `train` and for `mapo-fast show`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mapo_fast.engine.precision import choose_device
from mapo_fast.engine.processes import ALONE, Processes, in_processes
from mapo_fast.models.open import open_model
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.single_file import pieces
from mapo_fast.models.start import with_start
from mapo_fast.run.budget import Budget, is_planned, planned
from mapo_fast.run.export import DTYPES
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import on_cpu, value_of
from mapo_fast.settings.table import planned as choices
from mapo_fast.settings.view import Known, known
from mapo_fast.util.errors import UserError


def final_settings(
    config: Config,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    model: Callable[[], Pipeline],
    recorded: dict[str, Any] | None = None,
) -> tuple[Config, Budget | None]:
    """The config of a run on this device, and its memory budget.

    Every setting that is not a default is set in it; `Config.sources` says by whom.

    Args:
        model: opens the model's folder, if a plan is needed.
        recorded: settings of the run to resume, section by section.

    Raises:
        UserError: a setting does not work on the device or with several processes, or no plan fits.
    """
    return planned(_on(config, device, processes), model, device, recorded, processes)


def _on(config: Config, device: torch.device, processes: Processes) -> Config:
    """The config with the settings that the device and the number of processes decide."""
    config = in_processes(config, processes)
    if device.type == "cpu":
        left_open = {name: value for name, value in on_cpu().items() if name not in config.stated}
        config = with_settings(config, left_open, "device")
    if config.train.device == "auto":
        config = with_settings(config, {"train.device": device.type}, "device")
    return config


class Shown(NamedTuple):
    """A run's settings before it starts."""

    settings: dict[str, Known]
    unplanned: str = ""
    """Why the memory plan is not made, where a run would make one."""
    refused: UserError | None = None
    """The error that a run with these settings would raise."""


def look(config: Config) -> Shown:
    """The settings that a new run in one process will have; nothing is loaded.

    Where the model or the GPU is not on this machine, the memory plan is left open. Where the model is, what
    `auto` stands for is looked up there.
    """
    later = sorted(choices("exact").keys() - config.stated)
    try:
        device = choose_device(config.train)
    except UserError as error:
        return Shown(known(config, later), unplanned=str(error))
    config = _on(config, device, ALONE)
    is_open = is_planned(config, device)
    try:
        model = open_model(config, weights=False)
        config = with_start(config, model.start, model.parts["unet"])
    except UserError as error:
        if not is_open and config.adapter.start is None:
            return Shown(known(config))
        return Shown(known(config, later), unplanned=str(error))
    if not is_open:
        return Shown(known(with_model(config, model)))
    try:
        config = final_settings(config, device, model=lambda: model)[0]
    except UserError as error:
        return Shown(known(with_model(config, model), later), refused=error)
    return Shown(known(with_model(config, model)))


def with_model(config: Config, model: Pipeline) -> Config:
    """The config with what the model says in place of `auto`."""
    says = {
        "train.prediction": model.scheduler_config.get("prediction_type", "epsilon"),
        "train.zero_terminal_snr": "on" if model.scheduler_config.get("rescale_betas_zero_snr") else "off",
    }
    if config.adapter.kind == "full" and config.export.single_file:
        weights = [piece for piece in pieces(model, unet={}).values() if piece.nbytes]  # no markers
        types = {piece.dtype for piece in weights if piece.dtype.is_floating_point}
        says["export.dtype"] = next((name for name, dtype in DTYPES.items() if types == {dtype}), "auto")
    is_open = {name for name, value in says.items() if value != value_of(config, name) == "auto"}
    return with_settings(config, {name: says[name] for name in is_open}, "model")
