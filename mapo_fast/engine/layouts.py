"""Pair layouts: how the chosen and rejected halves of a batch go through the UNet.

A batch holds B pairs as 2B samples, chosen half first.

- `joint`: both halves go through every layer together.
- `split`: inside each checkpointed block the halves run one after the other. Each half is a checkpoint of
  its own, so backward recomputes, differentiates and frees one half before it touches the other: the
  block's transient memory is that of B images, not 2B, and no forward pass is added. What stays between
  blocks is the same as in `joint`. Blocks that are not checkpointed run as in `joint`.
- `sequential`: one half at a time through the whole UNet, see `sequential.py`; a block sees one half only.

No layer of a diffusion UNet mixes samples, so the halves are independent and all layouts give the same
gradients. Checkpointing has to be non-reentrant: there a parameter used by both halves still reaches its
gradient hook once, with the sum; reentrant checkpointing would fire the hook once a half.

In every layout the norm in front of a transformer's blocks is computed again in backward where what it feeds
saves its output: element-wise work, for 0.08 GiB of an SDXL pair at 1024². It goes with the fused operators,
which do the same inside blocks; without them (speed.fused_ops = false) the step is diffusers' own.

`split` copies a block's output once, where the halves are joined. Writing them into one output made before
holds more memory while the second half runs, needs the same copies, and a copy of the gradient in backward.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapo_fast.engine.offload_activations import ActivationOffload
from mapo_fast.util.errors import UserError

Layout = Literal["joint", "split", "sequential"]


def apply_layout(
    unet: Any,
    layout: Layout,
    *,
    gradient_checkpointing: bool | tuple[str, ...],
    offload: ActivationOffload | None = None,
    recompute_norms: bool = True,
) -> None:
    """Set a diffusers UNet's checkpointing to the layout.

    Args:
        gradient_checkpointing: all blocks of `checkpoint_blocks`, none, or those at or below one of these
            names, such as "down_blocks.2" or "mid_block.attentions.0.transformer_blocks".
        offload: where the inputs of checkpointed blocks wait for backward; None leaves them on the device.
        recompute_norms: in front of a transformer's blocks; see the top of this file.

    Raises:
        UserError: a name that is no block and holds none.
        ValueError: `split` without gradient checkpointing.
    """
    for module in unet.modules():
        if type(module) is Transformer2DModel:
            module.__class__ = _Transformer
        if isinstance(module, _Transformer):
            module.recompute_norm = recompute_norms
    if not gradient_checkpointing:
        if layout == "split":
            raise ValueError(
                "layout 'split' works inside checkpointed blocks: gradient_checkpointing must be on"
            )
        unet.disable_gradient_checkpointing()
        return
    blocks = checkpoint_blocks(unet)
    if isinstance(gradient_checkpointing, tuple):
        _check_names(gradient_checkpointing, list(blocks))
        chosen = {b for name, b in blocks.items() if below(name, gradient_checkpointing)}
    else:
        chosen = set(blocks.values())
    unet.enable_gradient_checkpointing(_BlockRunner(chosen, layout == "split", offload))


def checkpoint_blocks(unet: Any) -> dict[str, nn.Module]:
    """The blocks that diffusers can checkpoint, by name: residual blocks and transformer blocks.

    The first residual block of the middle always runs plainly.
    """
    return {
        f"{name}.{kind}.{index}": block
        for name, parent in unet.named_modules()
        if hasattr(parent, "gradient_checkpointing")
        for kind in ("resnets", "transformer_blocks")
        for index, block in enumerate(getattr(parent, kind, ()))
        if parent is not unet.mid_block or index > 0
    }


class _Transformer(Transformer2DModel):  # type: ignore[misc]
    """diffusers' transformer, whose blocks see proj_in(norm(x)); x is saved and norm(x) is not.

    Recomputation ends where the last saved tensor is there: in front of proj_in's matrix product.

    Tokens are an image in channels_last: where the residual lies so, nothing is copied on the way out.
    """

    recompute_norm: bool

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> Any:
        run = super()._operate_on_continuous_inputs
        if not self.recompute_norm:
            return run(hidden_states)
        if not any(p.requires_grad for p in self.proj_in.parameters()):
            return run(hidden_states)  # a frozen projection does not save its input
        dropout = has_dropout(self.proj_in)
        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=dropout)

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if not self.use_linear_projection or not residual.is_contiguous(memory_format=torch.channels_last):
            return super()._get_output_for_continuous_inputs(  # type: ignore[no-any-return]
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        tokens: Tensor = self.proj_out(hidden_states)
        return tokens.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


@dataclass(eq=False)
class _BlockRunner:
    """What diffusers calls in place of every block while gradients are on."""

    checkpointed: set[nn.Module]
    split: bool
    offload: ActivationOffload | None

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        if block not in self.checkpointed:
            return block(*args)
        if not self.split:
            return self._checkpoint(block, *args)
        samples = args[0].shape[0]
        if samples % 2:
            raise ValueError(
                f"layout 'split' needs a chosen and a rejected half, got a batch of {samples} samples"
            )
        halves = zip(*(_halves(value, samples) for value in args), strict=True)
        return torch.cat([self._checkpoint(block, *half) for half in halves])

    def _checkpoint(self, block: nn.Module, *args: Any) -> Any:
        if not any(x.requires_grad for x in (*args, *block.parameters()) if isinstance(x, Tensor)):
            return block(*args)  # in front of the first adapter: no backward, so no inputs to keep or move
        with nullcontext() if self.offload is None else self.offload.around():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=has_dropout(block))


def _halves(value: Any, samples: int) -> tuple[Any, Any]:
    """The halves of a tensor with one row per sample; non-batched arguments go to both halves unchanged.

    One `chunk` for both: backward then joins their gradients once and fills nothing with zeros.
    """
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples:
        chosen, rejected = value.chunk(2)
        return chosen, rejected
    return value, value


def has_dropout(module: nn.Module) -> bool:
    """Whether running it again has to replay the random state; saving that costs a copy."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in module.modules())


def below(name: str, prefixes: Collection[str]) -> bool:
    """Whether a module's name is one of these or below one."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _check_names(prefixes: tuple[str, ...], blocks: list[str]) -> None:
    known = sorted({part for name in blocks for part in accumulate(name.split("."), "{}.{}".format)})
    for prefix in prefixes:
        if prefix in known:
            continue
        near = difflib.get_close_matches(prefix, known, n=3, cutoff=0.4)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"names start with {', '.join(name for name in known if '.' not in name)}"
        )
        raise UserError(
            f"train.gradient_checkpointing: {prefix!r} names no block that can be checkpointed; {hint}"
        )
