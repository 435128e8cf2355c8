"""`patch_unet`: put the fused kernels into any diffusers UNet, and `unpatch_unet`: take them out again.

A patched module keeps its parameters, names, sub-modules and hooks; only its class changes, to a subclass
with another `forward`. State dicts, `save_pretrained`, peft, gradient checkpointing and `torch.compile` see
the same UNet.

| diffusers               | becomes                                                                         |
|-------------------------|---------------------------------------------------------------------------------|
| `BasicTransformerBlock` | residual + LayerNorm + projections (q/k/v, q, feed-forward) as one operator;    |
|                         | GEGLU + linear as one operator                                                  |
| `ResnetBlock2D`         | GroupNorm + SiLU + convolution as one operator, twice                           |
| peft's LoRA on a linear | base product and low-rank product as one operator                               |
| `GroupNorm`, `GEGLU`,   | the kernel alone, where the next module cannot be fused: a convolution with     |
| `LayerNorm`             | LoRA, dropout, an attention processor of your own                               |

Tensors that an operator recomputes element by element in backward are not saved in forward: about 5 GiB less
for one SDXL pair at 1024², with no matrix product repeated.

The q, k and v weights of self-attention move into one matrix, one after the other, and stay three Parameters
that view it: their product is one. Moving or casting the UNet afterwards (`.to`) separates them again; that
costs speed, nothing else.

A module that does more than its class's `forward` is called as before, with the same inputs and outputs: one
with hooks (its own or torch's global ones), with a `forward` of its own (LyCORIS, diffusers' hooks), of a
subclass, parametrized, or with a weight that is not a plain tensor. Every call checks this, so hooks may come
and go at any time. Less is fused around such a module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from mapo_fast.models.fp8 import Fp8Linear
from mapo_fast.models.quantise import QuantisedConv2d, QuantisedLinear
from mapo_fast.util.errors import UserError
from mapo_kernels import (
    LayerNorm,
    Lora,
    Projection,
    frozen_or_dense,
    geglu,
    geglu_linear,
    group_norm_silu,
    group_norm_silu_conv,
    join_weights,
    layer_norm,
    layer_norm_linear,
    lora_linear,
)

__all__ = ["patch_unet", "unpatch_unet"]


def patch_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Swap the fused operators into a UNet, in place, and return it.

    Adapters may be added before or after; layers that peft wraps later, outside the transformer blocks, keep
    peft's own forward until `patch_unet` is called again. Calling it twice changes nothing else.

    Args:
        unet: any diffusers `UNet2DConditionModel`: SDXL, SD 1.5, SD 2.1.

    A module with hooks or a replaced `forward` keeps its class too.

    Raises:
        TypeError: something else was passed.
        UserError: accelerate's hooks are in the UNet: they move weights while others compute with them.
    """
    _check(unet, "patch_unet")
    for module in unet.modules():
        _drop_leftover(module)
        if not _wrapped(module):
            module.__class__ = _fused_class(module)
        if isinstance(module, FusedTransformerBlock):
            _join(module.attn1)
    return unet


def unpatch_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Undo `patch_unet`, in place, and return the UNet: plain classes, each weight in its own storage.

    A module whose `forward` was replaced after patching stays as it is, because the replacement calls the
    fused one.

    Raises:
        TypeError: something else was passed.
        UserError: accelerate's hooks are in the UNet.
    """
    _check(unet, "unpatch_unet")
    for module in unet.modules():
        _drop_leftover(module)
        if isinstance(module, FusedTransformerBlock):
            for weight in _self_attention_weights(module.attn1):
                weight.data = weight.data.clone()
        if not _replaced(module):
            module.__class__ = _PLAIN.get(type(module), type(module))
    return unet


def _check(unet: Any, caller: str) -> None:
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"{caller}: got a {type(unet).__name__}, needs a diffusers UNet2DConditionModel "
            "(of a pipeline: pipe.unet; of peft's PeftModel: model.get_base_model())"
        )
    for name, module in unet.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UserError(
                f"{caller}: accelerate's hooks are in this UNet (in {name or 'the UNet itself'}). "
                "Remove them: pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_submodules(unet). "
                "Offloading and device maps may be switched on again after patching"
            )


# --- Leaves: one kernel for one module ---


class FusedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by the kernel; saves its input and the groups' statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) → the same shape and memory format."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, silu=False)


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' `GEGLU`; saves the projection's output only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, in) → (…, F)."""
        return geglu(self.proj(hidden_states))


class _FusedLora:
    """A peft LoRA layer over a linear; where it cannot be fused, peft's own forward runs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projection = None if args or kwargs else _projection(self)  # hooks of its own run around this call
        if projection is None or projection.lora is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        lora = projection.lora
        return lora_linear(x, projection.weight, projection.bias, lora.a, lora.b, lora.scale)


_LORA = {
    "FusedLoraLinear": ("peft.tuners.lora.layer", "Linear"),
    "FusedLoraLinear4bit": ("peft.tuners.lora.bnb", "Linear4bit"),
    "FusedLoraLinear8bitLt": ("peft.tuners.lora.bnb", "Linear8bitLt"),
}
"""The fused twins of peft's LoRA layers, with the classes they replace; made on first use."""


def __getattr__(name: str) -> Any:
    """A fused twin, also for a pickle loaded before any UNet is patched; peft is imported only here."""
    if name not in _LORA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, plain = _LORA[name]
    kind = getattr(import_module(module), plain)
    made = type(name, (_FusedLora, kind), {"__module__": __name__, "__doc__": _FusedLora.__doc__})
    _PLAIN[made] = kind
    globals()[name] = made
    return made


def _lora_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The fused twin of one of peft's LoRA layers over a linear, or the layer's own class."""
    for name, plain in _LORA.items():
        if plain == (kind.__module__, kind.__name__):
            return getattr(sys.modules[__name__], name)  # type: ignore[no-any-return]
    return kind


def projection_of(module: Any) -> Projection | None:
    """The linear map that a module computes, or None where it computes more than one product and an adapter.

    Understands `nn.Linear`, `Fp8Linear`, `QuantisedLinear`, bitsandbytes' 4-bit and 8-bit linears, and peft's
    LoRA over any of these with one active adapter: no dropout in effect, no DoRA or other variant, no bias of
    its own.
    """
    return None if _wrapped(module) else _projection(module)


def _projection(module: Any) -> Projection | None:
    """The projection of a module, whether or not hooks run around its call."""
    lora: Lora | None = None
    base = module
    kind = type(module)
    if isinstance(module, _FusedLora) or (kind.__module__, kind.__name__) in _LORA.values():
        base = module.base_layer
        if module.disable_adapters and module.merged:
            return None
        if not module.disable_adapters and not module.merged:
            active = [name for name in module.active_adapters if name in module.lora_A]
            if len(active) > 1:
                return None
            if active:
                lora = _lora_of(module, active[0])
                if lora is None:
                    return None
        if _wrapped(base):
            return None
    if _has_plain_weight(base, nn.Linear, Fp8Linear):
        return Projection(base.weight, base.bias, lora, fp8=type(base) is Fp8Linear)
    if type(base) is QuantisedLinear or type(base).__name__ in ("Linear4bit", "Linear8bitLt"):
        return Projection(frozen_or_dense(base), base.bias, lora)
    return None


def _lora_of(layer: Any, name: str) -> Lora | None:
    first, second = layer.lora_A[name], layer.lora_B[name]
    if (
        name in getattr(layer, "lora_variant", {})
        or layer.use_dora.get(name)
        or layer.lora_bias.get(name)
        or not _idle(layer.lora_dropout[name])
        or not all(
            _has_plain_weight(factor, nn.Linear) and not _wrapped(factor) for factor in (first, second)
        )
    ):
        return None
    return Lora(first.weight, second.weight, layer.scaling[name])


# --- Blocks ---


class FusedTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """Self-attention, cross-attention and feed-forward with their norms and residual adds fused.

    A residual add is left to the norm that reads its sum: `x` is the newest summand, `stream` the rest.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """(N, tokens, C) → (N, tokens, C); same arguments as diffusers' block."""
        if cross_attention_kwargs or self._chunk_size is not None:
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        context = encoder_hidden_states if self.only_cross_attention else None
        x, stream = _attention(self.attn1, self.norm1, hidden_states, None, context, attention_mask)
        if self.attn2 is not None:
            x, stream = _attention(
                self.attn2, self.norm2, x, stream, encoder_hidden_states, encoder_attention_mask
            )
        x, stream = _feed_forward(self.ff, self.norm3, x, stream)
        return x + stream


def _attention(
    attn: Any,
    norm: nn.LayerNorm,
    x: Tensor,
    stream: Tensor | None,
    context: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return attention(norm(x + stream)) and x + stream."""
    sources = (attn.to_q, attn.to_k, attn.to_v) if context is None else (attn.to_q,)
    projections = [projection_of(source) for source in sources]
    if not _plain_attention(attn) or mask is not None or not _plain_norm(norm) or None in projections:
        normed, total = _normed(norm, x, stream)
        return attn(normed, encoder_hidden_states=context, attention_mask=mask), total
    projected, total = _project(norm, projections, x, stream)  # type: ignore[arg-type]
    if context is not None:
        projected = (*projected, attn.to_k(context), attn.to_v(context))
    q, k, v = (t.view(*t.shape[:2], attn.heads, -1).transpose(1, 2) for t in projected)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attn.to_out[1](attn.to_out[0](mixed)), total


def _feed_forward(ff: Any, norm: nn.LayerNorm, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return ff(norm(x + stream)) and x + stream."""
    activation, last = ff.net[0], ff.net[2]
    first, second = projection_of(activation.proj), projection_of(last)
    plain = _plain(ff, FeedForward) and _plain(activation, GEGLU, FusedGEGLU) and _idle(ff.net[1])
    if first is None or second is None or not plain or not _plain_norm(norm):
        normed, total = _normed(norm, x, stream)
        return ff(normed), total
    (projected,), total = _project(norm, [first], x, stream)
    out = geglu_linear(projected, second)
    for module in ff.net[3:]:  # a final dropout
        out = module(out)
    return out, total


def _project(
    norm: nn.LayerNorm, projections: list[Projection], x: Tensor, stream: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the projections of norm(x + stream), and x + stream."""
    if stream is None:
        return layer_norm_linear(x, norm.weight, norm.bias, projections, norm.eps), x
    x, stream = _same_dtype(x, stream)
    return layer_norm_linear(x, norm.weight, norm.bias, projections, norm.eps, residual=stream)


def _normed(norm: nn.LayerNorm, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return norm(x + stream) and x + stream."""
    if stream is None or not _plain_norm(norm):
        total = x if stream is None else x + stream
        return norm(total), total
    x, stream = _same_dtype(x, stream)
    return layer_norm(x, norm.weight, norm.bias, norm.eps, residual=stream)


def _same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y cast to the dtype of their sum: autocast may give an fp32 stream and a bf16 summand."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


class FusedResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """GroupNorm + SiLU + convolution, twice, with the time embedding between them and a shortcut around."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """(N, C, h, w) → (N, C', h, w)."""
        act = self.nonlinearity
        hidden = _norm_silu_conv(self.norm1, act, None, self.conv1, input_tensor)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else act(temb))[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = _norm_silu_conv(self.norm2, act, self.dropout, self.conv2, hidden)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        total = input_tensor + hidden
        return total if self.output_scale_factor == 1.0 else total / self.output_scale_factor


def _norm_silu_conv(norm: Any, activation: Any, dropout: Any, conv: Any, x: Tensor) -> Tensor:
    """conv(dropout(activation(norm(x)))); None is no dropout."""
    if not (_plain(norm, nn.GroupNorm, FusedGroupNorm) and _plain(activation, nn.SiLU)):
        hidden = activation(norm(x))
    elif (dropout is None or _idle(dropout)) and _plain_convolution(conv):
        return group_norm_silu_conv(
            x,
            norm.num_groups,
            norm.weight,
            norm.bias,
            frozen_or_dense(conv),
            conv.bias,
            eps=norm.eps,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
    else:
        hidden = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return conv(hidden if dropout is None else dropout(hidden))  # type: ignore[no-any-return]


# --- Which modules can be fused ---

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    FusedGEGLU: GEGLU,
    FusedGroupNorm: nn.GroupNorm,
    FusedResnetBlock: ResnetBlock2D,
    FusedTransformerBlock: BasicTransformerBlock,
    LayerNorm: nn.LayerNorm,
}
"""Fused class → class that it replaces; peft's LoRA layers are added when first seen."""


def _fused_class(module: Any) -> type[nn.Module]:
    """The class to give a module: its own class where nothing can be fused."""
    kind = type(module)
    fused: type[nn.Module] = kind
    if kind is nn.GroupNorm:
        fused = FusedGroupNorm
    elif kind is nn.LayerNorm and len(module.normalized_shape) == 1:
        fused = LayerNorm
    elif kind is GEGLU:
        fused = FusedGEGLU
    elif kind is BasicTransformerBlock and _plain_transformer(module):
        fused = FusedTransformerBlock
    elif kind is ResnetBlock2D and _plain_resnet(module):
        fused = FusedResnetBlock
    else:
        fused = _lora_class(kind)
    return fused


def _plain_transformer(block: Any) -> bool:
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and type(block.ff) is FeedForward
        and isinstance(block.ff.net[0], GEGLU)
    )


def _plain_resnet(block: Any) -> bool:
    return block.time_embedding_norm == "default" and block.upsample is None and block.downsample is None


def _plain_attention(attn: Any) -> bool:
    """Whether the attention is projections, SDPA and an output projection, and nothing else."""
    return (
        _plain(attn, Attention)
        and type(attn.processor) is AttnProcessor2_0
        and attn.spatial_norm is None
        and attn.group_norm is None
        and attn.norm_q is None
        and attn.norm_k is None
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )


def _plain_convolution(conv: Any) -> bool:
    return (
        _plain(conv, nn.Conv2d, QuantisedConv2d)
        and (type(conv) is QuantisedConv2d or _has_plain_weight(conv, nn.Conv2d))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _plain_norm(norm: Any) -> bool:
    return _plain(norm, nn.LayerNorm, LayerNorm) and len(norm.normalized_shape) == 1


def _idle(dropout: Any) -> bool:
    """Whether a dropout passes its input on, and nothing else."""
    return _plain(dropout, nn.Identity) or (
        _plain(dropout, nn.Dropout) and not (dropout.training and dropout.p > 0)
    )


def _plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of just these classes, and calling it is calling its class's `forward`."""
    return type(module) in kinds and not _wrapped(module)


def _wrapped(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`: then it has to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or _replaced(module)
    )


def _replaced(module: nn.Module) -> bool:
    """Whether the instance has a `forward` that is not its class's."""
    own = module.__dict__.get("forward")
    return own is not None and not (
        isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward
    )


def _drop_leftover(module: nn.Module) -> None:
    """Delete an instance's `forward` that is its class's: removed hooks leave it, and it would hide ours."""
    if "forward" in module.__dict__ and not _replaced(module):
        del module.__dict__["forward"]


def _has_plain_weight(layer: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is of just these classes and its weight no tensor subclass (torchao's, DTensor)."""
    return type(layer) in kinds and not hasattr(layer.weight, "__tensor_flatten__")


# --- One matrix for q, k and v ---


def _self_attention_weights(attn: Any) -> Iterator[Tensor]:
    for layer in (attn.to_q, attn.to_k, attn.to_v):
        base = getattr(layer, "base_layer", layer)
        kept_in_fp8 = type(base) is QuantisedLinear and base.format.startswith("fp8")
        if (_has_plain_weight(base, nn.Linear, Fp8Linear) or kept_in_fp8) and not _wrapped(base):
            yield base.weight


def _join(attn: Any) -> None:
    """Let the q, k and v weights of a self-attention view one matrix; cross-attention's have other inputs."""
    weights = list(_self_attention_weights(attn))
    if len(weights) == 3 and len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1:
        join_weights(weights)
