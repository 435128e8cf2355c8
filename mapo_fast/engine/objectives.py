"""The loss module that a config's `[objective]` names."""

from __future__ import annotations

from typing import Any

from mapo_fast.loss import KTOLoss, MaPOLoss, PairLoss, PreferenceLoss, SFTLoss
from mapo_fast.settings.schema import ObjectiveConfig


def build_loss(config: ObjectiveConfig, num_train_timesteps: int) -> PairLoss | KTOLoss:
    """The objective as a module, with its stated settings over its defaults.

    It takes (prediction, target), chosen half first, and what the objective needs beside them, and returns
    `loss`, `chosen_error`, `rejected_error`, `logits` and `correct`. `kto` takes single samples: `KTOLoss`.
    """
    if config.name == "kto":
        return KTOLoss(**config.settings)
    if config.name == "sft":
        return SFTLoss()
    if config.name == "mapo":
        settings: dict[str, Any] = {"num_train_timesteps": num_train_timesteps, **config.settings}
        return MaPOLoss(config.form, config.reading, **settings)
    return PreferenceLoss(config.name, "mean", **config.settings)
