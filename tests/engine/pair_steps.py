"""Pairs for the tiny UNets of `tests.unets`, every objective as a loss, and gradients to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from mapo_fast.engine.step import PairInputs, predict
from mapo_kernels import OBJECTIVES, PairedLoss, paired_loss, paired_loss_from_errors

PAIRS = 3
SOME_BLOCKS = ("mid_block", "up_blocks.0.attentions")
MODELS: list[tuple[str, bool, bool | tuple[str, ...]]] = [
    ("full", False, False),
    ("full", True, True),
    ("full", True, SOME_BLOCKS),
    ("lora", False, True),
    ("lora", False, SOME_BLOCKS),
    ("lora", True, False),
]
"""What is trained, whether the UNet is patched, what is checkpointed: every two choices meet once."""


def pair_of_inputs(pairs: int = PAIRS, dtype: torch.dtype = torch.float64, side: int = 8) -> PairInputs:
    """Inputs of `unets.make_unet("sdxl")`, with pairs so close that their coefficients in MaPO differ."""
    generator = torch.Generator().manual_seed(14)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def twice(half: Tensor) -> Tensor:
        return torch.cat([half, half])

    noisy, target = draw(pairs, 4, side, side), draw(pairs, 4, side, side)
    near = torch.linspace(0.0, 0.008, pairs, dtype=dtype).view(-1, 1, 1, 1)
    return PairInputs(
        noisy=torch.cat([noisy, noisy + 0.3 * draw(pairs, 4, side, side)]),
        timesteps=twice(torch.randint(0, 1000, (pairs,), generator=generator)),
        prompt_embeds=twice(draw(pairs, 5, 24)),
        pooled_embeds=twice(draw(pairs, 12)),
        time_ids=torch.full((2 * pairs, 6), 64.0),
        target=torch.cat([target, target + near * draw(pairs, 4, side, side)]),
    )


class ObjectiveLoss:
    """Any of `OBJECTIVES` for three pairs, with what it needs: a reference, labels, a baseline."""

    def __init__(self, objective: str) -> None:
        def some(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        self.settings: dict[str, Any] = {"objective": objective}
        known = OBJECTIVES[objective]
        if known.reference:
            self.settings["reference_errors"] = some(1.2, 1.3, 0.9), some(1.1, 1.4, 1.0)
        if known.labels == "required":
            self.settings["labels"] = some(0.9, 0.6, 0.2)
        if known.baseline:
            self.settings["kto_baseline"] = some(0.05)

    def __call__(self, prediction: Tensor, target: Tensor) -> PairedLoss:
        return paired_loss(prediction, target, **self.settings)

    def from_errors(self, chosen_error: Tensor, rejected_error: Tensor) -> PairedLoss:
        return paired_loss_from_errors(chosen_error, rejected_error, **self.settings)


def add_lora(unet: Any, *, dropout: float = 0.0) -> None:
    """Add factors that are not zero to the attention's linears of a frozen UNet."""
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=dropout))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def trainable(unet: Any) -> list[nn.Parameter]:
    return [p for p in unet.parameters() if p.requires_grad]


def joint_backward(unet: Any, inputs: PairInputs, loss: Any) -> PairedLoss:
    """Forward and backward of both halves in one batch."""
    out: PairedLoss = loss(predict(unet, inputs), inputs.target)
    out.loss.backward()
    return out


def gradients(unet: Any, backward: Callable[[], object]) -> dict[str, Tensor]:
    """Every gradient that `backward` leaves, by name."""
    unet.zero_grad(set_to_none=True)
    backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert found.keys() == truth.keys()
    assert all(t.norm() > 0 for t in truth.values())
    return max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)
