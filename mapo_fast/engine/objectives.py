"""The loss module that a config's `[objective]` names."""

from __future__ import annotations

from mapo_fast.loss import Loss, PreferenceLoss, SampleLoss
from mapo_fast.settings.schema import ObjectiveConfig


def build_loss(config: ObjectiveConfig, num_train_timesteps: int) -> Loss:
    """The objective as a module, with the config's settings over its defaults.

    It takes (prediction, target), chosen half first or single samples, and what else the objective needs.
    """
    schedule = {"num_train_timesteps": float(num_train_timesteps)}
    given = {name: schedule[name] for name, s in config.known.settings.items() if s.role == "schedule"}
    settings = {**given, **config.settings}
    if config.known.samples == "single":
        return SampleLoss(config.kernel, **settings)
    return PreferenceLoss(config.kernel, "mean", **settings)
