"""LoRA on the UNet through peft, and its two files.

pytorch_lora_weights.safetensors   for diffusers: `pipe.load_lora_weights(folder)`. The scale alpha / rank
                                   is in the file's adapter metadata, which diffusers >= 0.35 reads.
lora_kohya.safetensors             kohya keys, with the true alpha in every layer: for ComfyUI, A1111 and
                                   Forge, kohya's own scripts, and diffusers too. For its names see `sdxl`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mapo_fast.models.lora_file import LoraFile, LoraLayer
from mapo_fast.models.sdxl import KOHYA_METADATA, kohya_name, pipeline_class, residual_layers
from mapo_fast.models.start import alpha_of
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors
from mapo_fast.util.folders import new_folder
from mapo_fast.util.tensorfile import rewrite, write_tensors

ADAPTER = "default"
"""peft's name of the one adapter."""
NO_MORE: Mapping[str, str] = MappingProxyType({})
"""No metadata except the network's description."""


def add_lora(
    unet: Any,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Freeze `unet` and add low-rank factors to every layer whose name ends in one of `targets`.

    y = W x + (alpha / rank) · B (A x), with A ~ Kaiming-uniform(a = √5) and B = 0, so training starts at the
    base model. A is drawn in fp32 from `seed` alone: the same for every device and base dtype, and the global
    random state is left as it was.

    Args:
        unet: diffusers `UNet2DConditionModel`, changed in place.
        rank: r, rows of A.
        alpha: numerator of the scale.
        targets: suffixes of layer names, such as `to_q` or `attn2.to_k`.
        seed: seed of A.
        dtype: of the factors; fp32 also on a bf16 base, since updates of 1e-5 vanish in bf16.

    Raises:
        UserError: a target matches no linear or convolution layer, or a layer that SDXL's UNet does not have.
    """
    from peft import LoraConfig

    _check_targets(unet, targets)
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
    gpus = sorted({p.device.index for p in unet.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):  # peft draws its own initialisation, replaced below
        unet.add_adapter(config, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if f".lora_A.{ADAPTER}." in name:
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data = drawn.to(parameter.device, dtype)
        elif f".lora_B.{ADAPTER}." in name:
            parameter.data = torch.zeros_like(parameter, dtype=dtype)


def add_start(unet: Any, layers: Mapping[str, LoraLayer], *, dtype: torch.dtype = torch.float32) -> None:
    """Freeze `unet` and add the factors of a LoRA file to its layers, each with its own rank and alpha.

    Args:
        unet: as in `add_lora`.
        layers: the file's layers, by the names of `unet`'s modules.
        dtype: as in `add_lora`.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    config = LoraConfig(**_peft_settings(layers), init_lora_weights=False)
    gpus = sorted({p.device.index for p in unet.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        unet.add_adapter(config, adapter_name=ADAPTER)
    modules = dict(unet.named_modules())
    for name, layer in layers.items():
        for factor, stored in ((modules[name].lora_A, layer.down), (modules[name].lora_B, layer.up)):
            weight = factor[ADAPTER].weight
            weight.data = stored.load().to(weight.device, dtype, copy=True).reshape(weight.shape)


def lora_state_dict(unet: Any) -> dict[str, Tensor]:
    """The LoRA factors, in the model's own memory: `<layer>.lora_A.weight` (r, in), `….lora_B.weight` (out,
    r).

    To resume: `add_lora(…)`, then `checkpoint.copy_into("model", lora_state_dict(unet))`.
    """
    return {name: parameter.detach() for name, parameter in lora_parameters(unet).items()}


def lora_parameters(unet: Any) -> dict[str, nn.Parameter]:
    """The LoRA factors as Parameters, under the names of `lora_state_dict`."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in unet.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


def save_lora(
    unet: Any, folder: Path, start: LoraFile | None = None, *, metadata: Mapping[str, str] | None = NO_MORE
) -> None:
    """Write both files of the adapter of `add_lora` or `add_start` into `folder`, which appears whole.

    Both give the outputs of the trained UNet at weight 1, also where alpha is not the rank.

    Args:
        unet: with the adapter.
        folder: the folder to make.
        start: the LoRA that training went on from; its factors of text encoders are written as they are.
        metadata: entries of both files in addition to the network's description. None writes only what a
            program needs to compute the same.

    Raises:
        UserError: disk full or not writable.
    """
    config = unet.peft_config[ADAPTER]
    factors = lora_state_dict(unet)
    texts = _texts(start)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            # peft keeps the targets in a set, whose order differs from process to process
            computes = {**config.to_dict(), "target_modules": sorted(config.target_modules)}
            of_texts: dict[str, Any] = {}
            for part, layers in texts.items():
                of_texts[f"{part}_lora_layers"] = _text_factors(layers)
                of_texts[f"{part}_lora_adapter_metadata"] = _text_metadata(layers)
            pipeline_class().save_lora_weights(
                temporary, unet_lora_layers=factors, unet_lora_adapter_metadata=computes, **of_texts
            )
            said = None if metadata is None else {**_network(config), **metadata}
            for written in list(temporary.iterdir()):
                rewrite(written, said)
            _write_kohya(unet, temporary / "lora_kohya.safetensors", texts, said)


def save_kohya(
    unet: Any, path: Path, start: LoraFile | None = None, *, metadata: Mapping[str, str] | None = NO_MORE
) -> None:
    """Write kohya's file of an adapter alone; see `save_lora`.

    Raises:
        UserError: disk full or not writable.
    """
    said = None if metadata is None else {**_network(unet.peft_config[ADAPTER]), **metadata}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            _write_kohya(unet, temporary, _texts(start), said)


def _write_kohya(unet: Any, path: Path, texts: Any, said: Mapping[str, str] | None) -> None:
    factors = kohya_state_dict(lora_state_dict(unet), _alphas(unet), residual_layers(unet.config))
    write_tensors(path, factors | kohya_text_factors(texts), {"format": "pt", **(said or {})})


def _texts(start: LoraFile | None) -> dict[str, Any]:
    """The text encoders' part of the LoRA that training went on from."""
    return {} if start is None else {part: own for part, own in start.parts.items() if part != "unet"}


def _network(config: Any) -> dict[str, str]:
    """Metadata that kohya's scripts write for a LoRA; A1111 takes a file without it for one of SD 1."""
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
        **KOHYA_METADATA,
    }


def _alphas(unet: Any) -> dict[str, float]:
    return {
        name: float(module.lora_alpha[ADAPTER])
        for name, module in unet.named_modules()
        if ADAPTER in getattr(module, "lora_A", ())
    }


def _text_name(layer: str) -> str:
    """A text encoder layer's name in a pipeline's files."""
    return layer if layer == "text_projection" else f"text_model.{layer}"


def _text_factors(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    return {
        f"{_text_name(name)}.lora_{side}.weight": stored.load()
        for name, layer in layers.items()
        for side, stored in (("A", layer.down), ("B", layer.up))
    }


def _text_metadata(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    from peft import LoraConfig

    settings = _peft_settings({_text_name(name): layer for name, layer in layers.items()})
    config = LoraConfig(**settings)
    return {**config.to_dict(), "target_modules": settings["target_modules"]}


def _peft_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Rank, alpha and layers in the form of peft's config."""
    widest = max(layers.values(), key=lambda layer: layer.rank)
    rank, alpha = widest.rank, alpha_of(widest)
    alphas = {name: alpha_of(layer) for name, layer in sorted(layers.items())}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        # patterns are regular expressions there
        "rank_pattern": {re.escape(n): one.rank for n, one in sorted(layers.items()) if one.rank != rank},
        "alpha_pattern": {re.escape(name): one for name, one in alphas.items() if one != alpha},
    }


def kohya_text_factors(texts: Mapping[str, Mapping[str, LoraLayer]]) -> dict[str, Tensor]:
    """The factors of text encoders under kohya's keys, with the true alpha in each layer."""
    state: dict[str, Tensor] = {}
    for part, layers in texts.items():
        number = 1 if part == "text_encoder" else 2
        for name, layer in layers.items():
            prefix = f"lora_te{number}_{_text_name(name).replace('.', '_')}"
            state[f"{prefix}.lora_down.weight"] = layer.down.load()
            state[f"{prefix}.lora_up.weight"] = layer.up.load()
            state[f"{prefix}.alpha"] = torch.tensor(alpha_of(layer))
    return state


def kohya_state_dict(
    factors: dict[str, Tensor], alphas: Mapping[str, float], layers: Sequence[int]
) -> dict[str, Tensor]:
    """Rename `lora_state_dict`'s factors to kohya's keys and add a scalar `<layer>.alpha` to each layer."""
    state: dict[str, Tensor] = {}
    for name, factor in factors.items():
        layer, _, factor_name = name.partition(".lora_")
        prefix = kohya_name(layer, layers)
        which = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[factor_name]
        state[f"{prefix}.{which}"] = factor
        state[f"{prefix}.alpha"] = torch.tensor(alphas[layer])
    return state


def _check_targets(unet: Any, targets: Sequence[str]) -> None:
    modules = {name: module for name, module in unet.named_modules() if name}  # the UNet itself has none
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
    endings = sorted({re.split(r"\.(?=[a-z])", name)[-1] for name in layers})
    for target in targets:
        matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        wrong = [name for name in matched if name not in layers]
        if not matched or wrong:
            what = f"is {wrong[0]}, not a linear or convolution layer" if wrong else "matches no layer"
            near = difflib.get_close_matches(target, endings, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"layers end in {', '.join(endings)}"
            raise UserError(f"adapter.targets: {target!r} {what} of the UNet; {hint}")
        for name in matched:
            try:
                kohya_name(name, residual_layers(unet.config))
            except KeyError:
                raise UserError(
                    f"adapter.targets: {target!r} matches {name}, which SDXL's UNet does not have"
                ) from None
