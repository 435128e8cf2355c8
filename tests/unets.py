"""Tiny UNets of the three Stable Diffusion families, and one training-like pass through them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_COMMON: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1),
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    },
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 24},
    "sd21": {
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}
DEEP = {"transformer_layers_per_block": (1, 2)}
"""Changes to a config: two blocks in each transformer. Most tests need no second one."""
SHALLOW: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}
"""Changes to a config: one level, for tests in which any few layers of every kind will do."""


def make_unet(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A UNet in training mode whose norm weights are not the trivial ones; `changes` are of its config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations at import are not what is tested
        from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(**_COMMON | FAMILIES[family] | changes)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.to(dtype).train()


def inputs(
    family: str, dtype: torch.dtype, samples: int = 2, side: int = 8, seed: int = 1
) -> tuple[Tensor, dict[str, Any]]:
    """Noisy latents (samples, 4, side, side) that require a gradient, and the UNet's other arguments."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    latents = draw(samples, 4, side, side).requires_grad_()
    others: dict[str, Any] = {
        "timestep": torch.tensor([7, 950] * (samples // 2)),
        "encoder_hidden_states": draw(samples, 5, 24),
    }
    if family == "sdxl":
        others["added_cond_kwargs"] = {"text_embeds": draw(samples, 12), "time_ids": draw(samples, 6)}
    return latents, others


def run(unet: Any, family: str, dtype: torch.dtype, compute: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output and every gradient of one pass, by name, in fp64.

    Args:
        dtype: what the inputs are rounded to.
        compute: what they are converted to afterwards, for the truth on rounded inputs.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: convert(part) for name, part in value.items()}
        return value.to(device, compute if value.is_floating_point() else None)

    device = next(unet.parameters()).device

    latents, others = inputs(family, dtype)
    latents = convert(latents).detach().requires_grad_()
    unet.zero_grad(set_to_none=True)
    out = unet(latents, **convert(others)).sample
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out.double() * weights.to(device)).sum().backward()
    assert latents.grad is not None
    gradients = {name: p.grad.double() for name, p in unet.named_parameters() if p.grad is not None}
    return {"output": out.detach().double(), "latents": latents.grad.double(), **gradients}
