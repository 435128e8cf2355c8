"""The names that a single-file SDXL checkpoint gives its tensors, from those of diffusers and transformers.

Stability AI's code names the UNet's and the VAE's layers in its own way, keeps CLIP ViT-L as transformers
does and CLIP ViT-bigG as OpenCLIP does. Three things are stored in another form there, too: the query, key
and value of OpenCLIP are one tensor, its text projection is transposed, and the VAE's attention has 1 × 1
convolutions where diffusers has linear layers.

Names are translated in one direction only. The model's tensors are known from its config (`trial`): the file
is searched for these, and any other tensor in it is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mapo_fast.models.sdxl import original_layer, residual_layers

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""Prefix of the keys of each part."""


class Place(NamedTuple):
    """Where a single file keeps a tensor."""

    key: str
    part: int = 0
    """Index among `parts` equal parts along the first dimension."""
    parts: int = 1
    transposed: bool = False
    convolution: bool = False
    """Whether a linear layer's weight (out, in) is stored like a convolution's, (out, in, 1, 1)."""


def canonical(name: str) -> str:
    """A tensor's name without what the versions of diffusers and transformers disagree on."""
    for old, new in _LEGACY.items():
        name = name.replace(old, new)
    return name.removeprefix("text_model.")


_LEGACY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in the attention of VAEs that older versions of diffusers wrote."""


def places(component: str, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Place]:
    """Where a single file keeps each tensor of a part, without the part's prefix.

    Args:
        component: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
        names: canonical names of the part's tensors.
        config: the part's config.

    Raises:
        KeyError: the original code has no such tensor.
    """
    names = list(names)
    if component == "unet":
        return _unet(names, config)
    if component == "vae":
        return {name: _vae(name, len(config["block_out_channels"])) for name in names}
    if component == "text_encoder":
        return {name: Place(name) for name in names}
    return {name: _open_clip(name) for name in names}


def _unet(names: list[str], config: Mapping[str, Any]) -> dict[str, Place]:
    layers = residual_layers(config)
    found = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        original = original_layer(layer, layers)
        if (block := _UPSAMPLER.match(name)) and not any(
            n.startswith(f"{block[1]}.attentions") for n in names
        ):
            original = original.replace(".2.conv", ".1.conv")  # it has the attention's place
        found[name] = Place(f"{original}.{kind}")
    return found


_UPSAMPLER = re.compile(r"(up_blocks\.\d+)\.upsamplers\.")

_VAE_LAYERS = (
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    (".resnets.", ".block."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    ("mid_block.block.0.", "mid.block_1."),
    ("mid_block.block.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(.+)")


def _vae(name: str, levels: int) -> Place:
    new = name
    for ours, theirs in _VAE_LAYERS:
        new = new.replace(ours, theirs)
    if match := _VAE_BLOCK.fullmatch(new):
        level = int(match[2])
        # the decoder's blocks are numbered from the image inwards
        side, number = ("down", level) if match[1] == "encoder" else ("up", levels - 1 - level)
        new = f"{match[1]}.{side}.{number}.{match[3]}"
    linear = ".attn_1." in new and ".norm." not in new and new.endswith(".weight")
    return Place(new, convolution=linear)


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": Place("token_embedding.weight"),
    "embeddings.position_embedding.weight": Place("positional_embedding"),
    "final_layer_norm.weight": Place("ln_final.weight"),
    "final_layer_norm.bias": Place("ln_final.bias"),
    "text_projection.weight": Place("text_projection", transposed=True),
}
_OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PROJECTION = re.compile(r"self_attn\.([qkv])_proj")


def _open_clip(name: str) -> Place:
    match = _CLIP_LAYER.fullmatch(name)
    if match is None:
        return _OPEN_CLIP[name]
    layer, kind = f"transformer.resblocks.{match[1]}", match[3]
    if projection := _PROJECTION.fullmatch(match[2]):
        return Place(f"{layer}.attn.in_proj_{kind}", "qkv".index(projection[1]), 3)
    return Place(f"{layer}.{_OPEN_CLIP_LAYERS[match[2]]}.{kind}")
