"""Whether settings ask for products in fp8, and which cards have them."""

from __future__ import annotations

from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_kernels.capability import OLDEST_FP8_CAPABILITY


def capability_for(config: Config) -> int:
    """The least compute capability that the settings need for fp8, 89 for 8.9; 0 where none asks for it."""
    return 0 if _asking(config) is None else OLDEST_FP8_CAPABILITY


def refuse_card_without_fp8(config: Config, name: str, capability: int) -> None:
    """Raise if the settings ask for fp8 products and the card cannot multiply fp8.

    Raises:
        UserError: the message names the setting that asks for fp8, and what to set instead.
    """
    if capability < capability_for(config):
        raise refusal(config, name, capability)


def refusal(config: Config, name: str, capability: int) -> UserError:
    """The error that names the setting that asks for fp8, and what to set instead."""
    asking = _asking(config)
    assert asking is not None
    setting, instead = asking
    if capability >= OLDEST_FP8_CAPABILITY:
        return UserError(f"{setting} needs Triton on Linux, which {name} has not here: {instead}")
    return UserError(
        f"{setting} needs Triton, Linux and a GPU of compute capability 8.9 or newer (RTX 40, H100), not "
        f"{name} ({capability // 10}.{capability % 10}): {instead}"
    )


def _asking(config: Config) -> tuple[str, str] | None:
    """The setting that asks for products in fp8, if one does, and what to do instead."""
    if config.adapter.base == "fp8":
        return "adapter.base = 'fp8'", "use adapter.base = 'int8', as small and more exact"
    if config.speed.fp8:
        return "speed.fp8 = true", "set speed.fp8 = false"
    return None
