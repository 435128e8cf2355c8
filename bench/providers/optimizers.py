"""The optimizer that the other recipes use."""

from __future__ import annotations

import torch

from bench.providers.task import LR, WEIGHT_DECAY


def adamw_8bit(
    parameters: list[torch.nn.Parameter], device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """bitsandbytes' AdamW8bit, and its name; on the CPU torch's fused AdamW."""
    if device.type == "cuda":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=LR, weight_decay=WEIGHT_DECAY), "bitsandbytes AdamW8bit"
    adamw = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return adamw, "torch's fused AdamW (bitsandbytes' is for GPUs)"
