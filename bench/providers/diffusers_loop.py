"""A well-tuned loop over diffusers' UNet, without this project's kernels, layouts or data path.

bf16 weights, latents and embeddings cached and resident, SDPA, channels_last, bitsandbytes' AdamW8bit, no
host wait in a step. On the CPU fp32 and torch's fused AdamW: there it is the bare loop that the engine's own
cost is measured against, with the same loss module.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bench.providers.base import Arithmetic, Provider
from bench.providers.optimizers import adamw_8bit
from bench.providers.task import MAX_GRAD_NORM, PAIRS, Task, adapt, fill_factors, load_unet
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.loss import MaPOLoss


class DiffusersLoop(Provider):
    """A loop in plain PyTorch with all usual optimisations."""

    name: ClassVar[str] = "diffusers"
    compiled: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        gpu = task.device.type == "cuda"
        storage = torch.bfloat16 if gpu else torch.float32
        self.arithmetic = Arithmetic(storage)
        self.unet = load_unet(task, storage)
        if gpu:  # on the CPU it is slower for convolutions this small
            self.unet.to(memory_format=torch.channels_last)
        if task.kind == "lora":
            adapt(self.unet, storage)
            fill_factors(self.unet)
        if task.checkpointing:
            self.unet.enable_gradient_checkpointing()
        if self.compiled:
            self.unet.compile_repeated_blocks()
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer, optimizer = adamw_8bit(self.parameters, task.device)
        self.loss = MaPOLoss()
        self.cached = _resident(self)
        self.differences = (
            "noise and timesteps from the global random state",
            f"{optimizer}" + (", no stochastic rounding of bf16 weights" if gpu else ""),
            "all latents and embeddings resident on the device",
        )

    def data(self, step: int) -> PairInputs:
        """Noise the step's resident latents."""
        pairs, device = self.task.pairs, self.task.device
        rows = (torch.arange(pairs, device=device) + step * pairs) % PAIRS  # for a list the host would wait
        chosen, rejected, prompt, pooled, ids = (x[rows] for x in self.cached)
        latents = torch.cat([chosen, rejected])
        noise = torch.randn_like(chosen).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, 1000, (pairs,), device=device).repeat(2)
        noisy = self.pairs.diffusion.add_noise(latents, noise, timesteps)
        return PairInputs(
            noisy, timesteps, prompt.repeat(2, 1, 1), pooled.repeat(2, 1), ids.repeat(2, 1), noise
        )

    def accumulate(self, inputs: PairInputs) -> Tensor:
        """Forward and backward of both halves in one batch."""
        out = self.loss(predict(self.unet, inputs), inputs.target)
        out.loss.backward()
        return out.loss.detach()

    def update(self) -> None:
        """Clip and step."""
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class CompiledDiffusersLoop(DiffusersLoop):
    """The plain loop with torch.compile on its repeated blocks."""

    name: ClassVar[str] = "diffusers, compiled"
    compiled: ClassVar[bool] = True


def _resident(loop: DiffusersLoop) -> tuple[Tensor, ...]:
    """Latents of both halves, embeddings, pooled embeddings and time ids of all pairs on the device."""
    batch = loop.pairs.cache.batch(loop.pairs.cache.train[:], flip=None, drop=None)
    parts = (
        batch.chosen_latents,
        batch.rejected_latents,
        batch.prompt_embeds,
        batch.pooled_embeds,
        batch.time_ids_chosen,
    )
    return tuple(part.to(loop.task.device) for part in parts)
