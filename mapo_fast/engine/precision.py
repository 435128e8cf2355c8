"""Numeric precision of a run: which tensors are stored how, and what autocast does.

| precision   | full fine-tune                    | LoRA                                     |
|-------------|-----------------------------------|------------------------------------------|
| `fp32`      | fp32                              | fp32                                     |
| `bf16`      | fp32 weights, bf16 arithmetic     | bf16 base, fp32 factors, bf16 arithmetic |
| `fp16`      | refused                           | fp16 base, fp32 factors, gradient scaler |
| `pure_bf16` | bf16                              | bf16 base and factors                    |

`pure_bf16` needs optim.name = 'adamw8bit', whose stochastic rounding keeps updates that are smaller than the
distance of two bf16 numbers; the other optimizers lose them. Its sums of gradients over micro-batches are
rounded stochastically for the same reason (`gradient_sums.py`), except where `train.shard` splits them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.hardware.driver import why_no_gpu
from mapo_fast.settings.schema import Config, TrainConfig
from mapo_fast.util.errors import UserError


@dataclass(frozen=True)
class Precision:
    """Storage and arithmetic types of one run."""

    base: torch.dtype
    """Storage of the UNet's weights."""
    trainable: torch.dtype
    """Storage of the trained parameters: the UNet's weights, or the LoRA factors."""
    autocast: torch.dtype | None
    """Arithmetic under autocast; None computes in the stored type."""
    scaled: bool
    """Whether the loss needs a gradient scaler."""

    def context(self, device: torch.device) -> AbstractContextManager[None]:
        """The autocast context of forward passes.

        Autocast's cache of cast weights stays off: it would hold a half-precision copy of every weight
        until the forward pass ends, on top of the gradients of the micro-batches before.
        """
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast, cache_enabled=False)


def choose_precision(config: Config, device: torch.device) -> Precision:
    """Storage and arithmetic types for a config on a device.

    Raises:
        UserError: a card without bf16 arithmetic, or fp16 without an NVIDIA GPU.
    """
    name = config.train.precision
    lora = config.adapter.kind == "lora"
    if name == "fp32":
        return Precision(torch.float32, torch.float32, None, scaled=False)
    if name == "fp16":
        if device.type != "cuda":
            raise UserError("train.precision = 'fp16' needs an NVIDIA GPU; use 'fp32' or 'bf16' on the CPU")
        return Precision(torch.float16, torch.float32, torch.float16, scaled=True)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        card = torch.cuda.get_device_name(device)
        way_out = "'fp16'" if lora else "'fp32', or adapter.kind = 'lora' with train.precision = 'fp16'"
        raise UserError(f"{card} cannot do bf16 (train.precision = {name!r}); use {way_out}")
    if name == "pure_bf16":
        return Precision(torch.bfloat16, torch.bfloat16, None, scaled=False)
    return Precision(torch.bfloat16 if lora else torch.float32, torch.float32, torch.bfloat16, scaled=False)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use this many CPU threads within the context; 0 leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(config: TrainConfig, processes: Processes = ALONE) -> torch.device:
    """The device of a run; with several processes on a machine, each one has its own GPU.

    Raises:
        UserError: `cuda` is asked for and there is no NVIDIA GPU that torch can use, or not one for each.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"train.device = 'cuda', but torch sees no NVIDIA GPU: {why_no_gpu()}")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.size == 1:
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    if processes.local_size > gpus:
        raise UserError(
            f"{processes.local_size} processes were launched on this machine, where torch sees {gpus} "
            f"GPU(s): launch {gpus}, or set train.device = 'cpu'"
        )
    return torch.device("cuda", processes.local_rank)
