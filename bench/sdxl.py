"""SDXL's UNet and its inputs on fake tensors: no weights, no memory."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mapo_fast.engine.step import PairInputs

CPU = torch.device("cpu")  # fake tensors claim the CPU: claiming CUDA aborts on a CPU build of torch


def fake_pair(side: int) -> PairInputs:
    """Inputs of SDXL's UNet for one pair of latents (4, side, side)."""
    return PairInputs(
        noisy=torch.zeros(2, 4, side, side),
        timesteps=torch.zeros(2, dtype=torch.int64),
        prompt_embeds=torch.zeros(2, 77, 2048),
        pooled_embeds=torch.zeros(2, 1280),
        time_ids=torch.zeros(2, 6),
        target=torch.zeros(2, 4, side, side),
    )


def make_fake(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta parameters and buffers by fake tensors that claim the CPU."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fake = FakeTensor(mode, parameter.detach().to("meta"), CPU)
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = FakeTensor(mode, buffer.detach().to("meta"), CPU)
