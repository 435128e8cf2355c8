"""Whether a device multiplies fp8, for settings that ask for it."""

from __future__ import annotations

import torch

from mapo_fast.settings.fp8 import capability_for, refusal
from mapo_fast.settings.schema import Config
from mapo_kernels.fp8 import in_fp8
from mapo_kernels.hardware import card


def refuse_without_fp8(config: Config, device: torch.device) -> None:
    """Raise where a GPU is to multiply fp8 and cannot; the CPU computes the same in the dtype of training.

    Raises:
        UserError: naming the setting that asks for it, and what to set instead.
    """
    if capability_for(config) and device.type == "cuda" and not in_fp8(device):
        raise refusal(config, torch.cuda.get_device_name(device), card(device).capability)
