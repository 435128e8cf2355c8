"""The recipe that MaPO's authors released, from its description, for their 8-bit optimizer and its setting.

fp32 weights (a LoRA on fp16 ones), fp16 autocast with a gradient scaler, both halves in one batch,
checkpointed; every step encodes its images with an fp32 VAE and its prompts with both text encoders, and
reads its figures back to the host one by one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers.base import Arithmetic, Provider
from bench.providers.encoders import Encoders
from bench.providers.optimizers import adamw_8bit
from bench.providers.task import MAX_GRAD_NORM, Task, adapt, fill_factors, load_unet
from mapo_fast.engine.step import PairInputs

BETA, SNR, STEPS = 0.1, 0.5, 1000
SCALE = 2.0**8
"""Start value of the gradient scaler; its default may overflow, and skipped steps cannot be timed."""


class Released(Provider):
    """The authors' loop."""

    name: ClassVar[str] = "released"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        gpu, full = task.device.type == "cuda", task.kind == "full"
        half = torch.float16 if gpu else torch.bfloat16
        self.arithmetic = Arithmetic(torch.float32 if full else half, half, torch.float32)
        self.unet = load_unet(task, self.arithmetic.weights)
        if not full:
            adapt(self.unet, torch.float32)
            fill_factors(self.unet)
        self.unet.enable_gradient_checkpointing()
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer, optimizer = adamw_8bit(self.parameters, task.device)
        self.scaler = torch.amp.GradScaler(task.device.type, init_scale=SCALE, enabled=gpu)
        self.encoders = Encoders(task, half)
        self.differences = (
            "encodes images and prompts in every step",
            "time ids in half precision",
            "exp(x) − 1 in fp32: the logit of near-equal errors is rounded",
            f"{half} autocast" + (" with a gradient scaler" if gpu else "; fp16 and its scaler need a GPU"),
            f"{optimizer}; always checkpointed",
            "reads six figures back to the host in every step",
        )

    def data(self, step: int) -> PairInputs:
        """Images and token ids of the step, encoded."""
        latents, hidden, pooled, ids = self.encoders.encode(step)
        pairs = self.task.pairs
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, STEPS, (pairs,), device=latents.device).repeat(2)
        noisy = self.pairs.diffusion.add_noise(latents, noise, timesteps)
        return PairInputs(noisy, timesteps, hidden, pooled, ids, noise)

    def accumulate(self, inputs: PairInputs) -> Tensor:
        """Forward, the loss as the authors write it, backward, figures to the host."""
        with self.arithmetic.context(self.task.device):
            conditions = {"text_embeds": inputs.pooled_embeds, "time_ids": inputs.time_ids}
            prediction = self.unet(
                inputs.noisy, inputs.timesteps, inputs.prompt_embeds, added_cond_kwargs=conditions
            ).sample
        errors = F.mse_loss(prediction.float(), inputs.target.float(), reduction="none")
        errors_w, errors_l = errors.mean(dim=list(range(1, errors.ndim))).chunk(2)
        odds_w, odds_l = (SNR * e / (torch.exp(SNR * e) - 1) for e in (errors_w, errors_l))
        ratio = F.logsigmoid(STEPS * (odds_w - odds_l))
        loss = errors_w.mean() - BETA * ratio.mean()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for figure in (loss, errors_w.mean(), errors_l.mean(), odds_w.mean(), odds_l.mean(), ratio.mean()):
            figure.item()
        return loss.detach()

    def update(self) -> None:
        """Unscale, clip, step."""
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, parameter: Tensor) -> Any:
        """A parameter's gradient, without the scaler's factor."""
        if parameter.grad is None:
            return None
        return parameter.grad / self.scaler.get_scale()
