"""The length of a run: its steps, and a line with its memory and time."""

from __future__ import annotations

import math

import torch

from mapo_fast.data.cache import PairCache
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.planner.report import run_of, sentence
from mapo_fast.run.budget import Budget
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config


def with_steps(config: Config, cache: PairCache, processes: int) -> Config:
    """The config with `train.steps` where it has `train.epochs`: so many passes over the training pairs.

    From here on the run has steps alone, and a resume takes the same ones.
    """
    train = config.train
    if train.epochs is None:
        return config
    batches = MicroBatches(cache.train, train.pairs_per_batch, train.seed, paired=cache.paired)
    steps = math.ceil(train.epochs * batches.per_epoch / (train.accumulation * processes))
    return with_settings(config, {"train.epochs": None, "train.steps": max(1, steps)}, "epochs")


def forecast(config: Config, budget: Budget | None) -> str:
    """Memory and time of the run, in one line."""
    run = run_of(config, "")
    if budget is None:
        return f"{run.steps:,} steps of {run.images}; memory and time are not predicted here"
    device = budget.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return sentence(budget.plan, budget.vram, run, name)
