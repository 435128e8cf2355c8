"""The task that all providers train: the same weights on the same pairs.

`tiny` is the demo's tiny SDXL, trained weights and all; `sdxl` is SDXL's own UNet at 1024² with random
weights. Weights are numbers that bf16 holds exactly, so that a provider's storage type changes none of them.
"""

from __future__ import annotations

import functools
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.random_cache import write_random_cache
from mapo_fast.data.cache import PairCache
from mapo_fast.demo.build_tiny_sdxl import SCHEDULER
from mapo_fast.demo.run import TINY_SDXL
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.step import PairInputs, training_inputs
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.lora import add_lora
from mapo_fast.models.open import open_sdxl
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LR = 1e-6
WEIGHT_DECAY = 1e-2
MAX_GRAD_NORM = 1.0
PAIRS = 64
"""Pairs in the data set."""


@dataclass(frozen=True)
class Task:
    """One comparison: everything that providers must have in common."""

    size: Literal["tiny", "sdxl"]
    kind: Literal["full", "lora"]
    pairs: int
    """Pairs in a step."""
    checkpointing: bool
    """Whether activations are recomputed, where the provider has the choice."""
    device: torch.device

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return 1024 if self.size == "sdxl" else 32

    @property
    def side(self) -> int:
        """Side of the latents."""
        return self.resolution // (8 if self.size == "sdxl" else 4)

    @property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's diffusers config."""
        return SDXL_UNET if self.size == "sdxl" else open_sdxl(TINY_SDXL).config("unet")

    def config(self, **sections: dict[str, Any]) -> Config:
        """The task as mapo_fast's settings, `sections` on top."""
        table: dict[str, Any] = {
            "model": {"path": "model"},
            "data": {"cache": "cache", "resolution": self.resolution, "bucket_step": self.resolution},
            "train": {"output": "run", "pairs_per_batch": self.pairs},
            "adapter": {"kind": self.kind, "rank": RANK, "targets": TARGETS},
            "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM},
        }
        for name, values in sections.items():
            table[name] = {**table.get(name, {}), **values}
        return parse_config(table)


def load_unet(task: Task, dtype: torch.dtype) -> Any:
    """The start model on the task's device, in training mode."""
    if task.size == "tiny":
        unet = open_sdxl(TINY_SDXL).load_unet(torch.float32)
        with torch.no_grad():
            for p in unet.parameters():
                p.copy_(p.bfloat16())
        return unet.to(task.device, dtype).train()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(task.unet_config)
    unet = unet.to(dtype).to_empty(device=task.device)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.dim() > 1:
                p.copy_(_drawn(name, p, 0.03))
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet.train()


def adapt(unet: Any, dtype: torch.dtype) -> None:
    """Freeze the UNet and add LoRA factors to its attention, as `mapo_fast` does."""
    add_lora(unet, rank=RANK, alpha=float(RANK), targets=TARGETS, seed=0, dtype=dtype)


@torch.no_grad()
def fill_factors(unet: Any) -> None:
    """Give LoRA factors values other than zero, so that all gradients can be compared."""
    for name, p in unet.named_parameters():
        if ".lora_A." in name:
            p.copy_(p.bfloat16())
        elif ".lora_B." in name:
            p.copy_(_drawn(name, p, 0.02))


def _drawn(name: str, like: Tensor, limit: float) -> Tensor:
    """Fill with uniform values in ±limit, equal for a name on all devices of a kind; rounded to bf16."""
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()))
    drawn = torch.empty(like.shape, device=like.device)
    return drawn.uniform_(-limit, limit, generator=generator).bfloat16()


class Pairs:
    """Cached pairs of a task, as `mapo-fast prepare` writes them, and the engine's batches of them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.diffusion = Diffusion(SCHEDULER)
        self.cache = PairCache.open(_cache_folder(task.size))
        self.batches = MicroBatches(self.cache.train, task.pairs, seed=0)

    def batch(self, step: int) -> PairInputs:
        """The pairs of a step, on the device."""
        epoch, pairs = self.batches.at(step)
        return training_inputs(
            self.cache,
            pairs,
            self.diffusion,
            seed=0,
            epoch=epoch,
            caption_dropout=0.0,
            device=self.task.device,
        )


@functools.cache
def _cache_folder(size: str) -> Path:
    folder = Path(_temporary().name) / size
    side, factor = (1024, 8) if size == "sdxl" else (32, 4)
    widths, pooled = ((768, 1280), 1280) if size == "sdxl" else ((32, 32), 32)
    return write_random_cache(
        folder, PAIRS, [(side, side)], vae_factor=factor, text_widths=widths, pooled=pooled
    )


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mapo_fast_bench_")
