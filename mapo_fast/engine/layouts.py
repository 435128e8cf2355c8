"""Pair layouts: how the chosen and rejected halves of a batch go through the UNet.

A batch holds B pairs as 2B samples, chosen half first.

- `joint`: both halves go through every layer together.
- `split`: inside each checkpointed block the halves run one after the other. Each half is a checkpoint of
  its own, so backward recomputes, differentiates and frees one half before it touches the other: the
  block's transient memory is that of B images, not 2B, and no forward pass is added. What stays between
  blocks is the same as in `joint`.

No layer of a diffusion UNet mixes samples, so the halves are independent and both layouts give the same
gradients. Checkpointing has to be non-reentrant: there a parameter used by both halves still reaches its
gradient hook once, with the sum; reentrant checkpointing would fire the hook once a half.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Layout = Literal["joint", "split"]


def apply_layout(unet: Any, layout: Layout, *, gradient_checkpointing: bool) -> None:
    """Set a diffusers UNet's checkpointing to the layout.

    Raises:
        ValueError: `split` without gradient checkpointing.
    """
    if not gradient_checkpointing:
        if layout == "split":
            raise ValueError(
                "layout 'split' works inside checkpointed blocks: gradient_checkpointing must be on"
            )
        unet.disable_gradient_checkpointing()
        return
    unet.enable_gradient_checkpointing(_checkpointed if layout == "joint" else _split_block)


def _checkpointed(block: Any, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=_has_dropout(block))


def _split_block(
    block: Any,
    hidden: Tensor,  # (2B, …)
    *args: Any,  # tensors with 2B samples are halved, everything else is passed on
) -> Tensor:
    samples = hidden.shape[0]
    if samples % 2:
        raise ValueError(
            f"layout 'split' needs a chosen and a rejected half, got a batch of {samples} samples"
        )

    def half_of(value: Any, index: int) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples:
            return value.chunk(2)[index]
        return value

    halves = [_checkpointed(block, *(half_of(value, i) for value in (hidden, *args))) for i in (0, 1)]
    return torch.cat(halves)


def _has_dropout(block: torch.nn.Module) -> bool:
    """Whether recomputation has to replay the random state; saving it costs a copy per block."""
    return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in block.modules())
