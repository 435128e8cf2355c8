"""The compute capability that settings need of a card, as one number, 89 for 8.9."""

from __future__ import annotations

from mapo_fast.settings.fp8 import capability_for
from mapo_fast.settings.schema import Config

OLDEST_BF16 = 80
"""Compute capability below which a card does not compute in bf16."""


def least_capability(config: Config) -> int:
    """The least compute capability that a config needs; 0 where any card does."""
    return max(capability_for(config), OLDEST_BF16 if "bf16" in config.train.precision else 0)
