"""The loss module that a config's `[objective]` names."""

from __future__ import annotations

from mapo_fast.config import ObjectiveConfig
from mapo_fast.loss import MaPOLoss, SFTLoss

DEFAULT_BETA = 0.1
"""β of the `code` form as the authors released it; the `paper` form has no default."""


def build_loss(config: ObjectiveConfig, num_train_timesteps: int) -> MaPOLoss | SFTLoss:
    """`MaPOLoss` or `SFTLoss`: both take (prediction, target), chosen half first, and return `loss`,
    `chosen_error`, `rejected_error`, `logits` and `correct`.
    """
    if config.name == "sft":
        return SFTLoss()
    return MaPOLoss(
        form=config.form,
        reading=config.reading,
        beta=DEFAULT_BETA if config.beta is None else config.beta,
        snr=config.snr,
        num_train_timesteps=num_train_timesteps,
    )
