"""Attention by the flash-attn package, where it is installed; torch's own (`sdpa`) has flash kernels too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mapo_fast.util.errors import UserError


class FlashProcessor:
    """What diffusers' `Attention` calls: projections, flash attention, output projection.

    Args:
        attend: `flash_attn.flash_attn_func`, of (N, tokens, heads, C / heads) in fp16 or bf16.
    """

    def __init__(self, attend: Any) -> None:
        self.attend = attend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        """(N, tokens, C) → (N, tokens, C); a UNet in training has no masks."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        mixed: Tensor = self.attend(*(x.unflatten(-1, (attn.heads, -1)) for x in projected))
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2)))  # type: ignore[no-any-return]


def use_flash(unet: Any) -> None:
    """Let all attention of a UNet run through flash-attn.

    Raises:
        UserError: it is not installed.
    """
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UserError(
            f"train.attention = 'flash' needs the flash-attn package ({error}); use 'sdpa', which has flash "
            "kernels of torch's own"
        ) from None
    unet.set_attn_processor(FlashProcessor(flash_attn_func))
