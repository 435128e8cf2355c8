"""Linear layers that train and are multiplied in fp8: `speed.fp8`.

Those of the transformer blocks, which have nearly all of a UNet's linear arithmetic. Everything passes
through the others (embeddings, `proj_in`, `proj_out`), and they cost little.

torchao's `Float8Linear` is not used. As a module of its own it would take the projections out of the
operators that `patch_unet` fuses, which would save the normed tensors again, and its amax, scale and cast are
passes of their own unless torch.compile fuses them. See kernels/mapo_kernels/_fp8.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mapo_fast.config import Config
from mapo_fast.errors import UserError
from mapo_kernels import fp8_linear
from mapo_kernels._fp8 import MULTIPLE, OLDEST_FP8_CAPABILITY, in_fp8
from mapo_kernels._launch import card

__all__ = ["Fp8Linear", "capability_for", "refuse_card_without_fp8", "refuse_without_fp8", "use_fp8"]


class Fp8Linear(nn.Linear):
    """A linear layer, (…, C) → (…, N); an `nn.Linear` becomes one in place and keeps its Parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """In the input's dtype, or autocast's."""
        return fp8_linear(input, self.weight, self.bias)


def fits_fp8(name: str, weight: Tensor) -> bool:
    """Whether a linear layer of this name and weight (N, C) is one that fp8 is for."""
    return ".transformer_blocks." in name and not any(size % MULTIPLE for size in weight.shape)


def use_fp8(unet: Any) -> None:
    """Let the linear layers of a UNet's transformer blocks multiply in fp8; before `patch_unet`."""
    for name, layer in unet.named_modules():
        if type(layer) is nn.Linear and fits_fp8(name, layer.weight):
            layer.__class__ = Fp8Linear


def capability_for(config: Config) -> int:
    """The least compute capability that the settings need for fp8, 89 for 8.9; 0 where none asks for it."""
    return 0 if _asking(config) is None else OLDEST_FP8_CAPABILITY


def refuse_without_fp8(config: Config, device: torch.device) -> None:
    """Raise where a GPU is to multiply fp8 and cannot; the CPU computes the same in the dtype of training.

    Raises:
        UserError: naming the setting that asks for it, and what to set instead.
    """
    if capability_for(config) and device.type == "cuda" and not in_fp8(device):
        raise _refusal(config, torch.cuda.get_device_name(device), card(device).capability)


def refuse_card_without_fp8(config: Config, name: str, capability: int) -> None:
    """Likewise for a card that is not there.

    Raises:
        UserError: in the same words.
    """
    if capability < capability_for(config):
        raise _refusal(config, name, capability)


def _refusal(config: Config, name: str, capability: int) -> UserError:
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
