"""From a config to the parts of a run: the UNet ready to train, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from mapo_fast.config import Config, OptimConfig, TrainConfig
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.precision import Precision
from mapo_fast.errors import UserError
from mapo_fast.lora import add_lora
from mapo_fast.model import SDXLFolder


def scheduler_overrides(config: TrainConfig) -> dict[str, Any]:
    """The scheduler settings that `[train]` states explicitly."""
    overrides: dict[str, Any] = {}
    if config.prediction != "auto":
        overrides["prediction_type"] = config.prediction
    if config.zero_terminal_snr != "auto":
        overrides["rescale_betas_zero_snr"] = config.zero_terminal_snr == "on"
    return overrides


def build_unet(config: Config, folder: SDXLFolder, precision: Precision, device: torch.device) -> Any:
    """The UNet on the device, ready to train: adapter, attention and pair layout applied."""
    unet = folder.load_unet(precision.base).to(device)
    if config.adapter.kind == "lora":
        adapter = config.adapter
        add_lora(
            unet,
            rank=adapter.rank,
            alpha=adapter.alpha or float(adapter.rank),
            targets=adapter.targets,
            seed=config.train.seed,
            dtype=precision.trainable,
        )
    if config.train.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"train.attention = 'xformers' cannot be used ({first}); use 'sdpa'") from None
    apply_layout(unet, config.train.layout, gradient_checkpointing=config.train.gradient_checkpointing)
    return unet.train()


def learning_rate(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the optimizer step, by diffusers' schedules."""
    throwaway = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    schedule = get_scheduler(
        config.schedule, throwaway, num_warmup_steps=config.warmup_steps, num_training_steps=steps
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.lr * float(factor(step))
