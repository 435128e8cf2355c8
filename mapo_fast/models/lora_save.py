"""A LoRA file in another layout: kohya's, for ComfyUI, A1111 and Forge, or peft's folder.

Factors are written as they are stored; alpha says for every layer what the programs multiply them by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from mapo_fast.models.lora_file import LoraFile, LoraLayer
from mapo_fast.models.parts import Part
from mapo_fast.models.sdxl import KOHYA_METADATA, kohya_name, residual_layers
from mapo_fast.models.stored import DTYPES, StoredTensor
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, write_json
from mapo_fast.util.folders import new_folder
from mapo_fast.util.tensorfile import Piece, write_pieces


def save_kohya(lora: LoraFile, model: Mapping[str, Part], path: Path, *, metadata: bool = True) -> None:
    """Write a LoRA with kohya's keys and the true alpha in every layer.

    Args:
        lora: the LoRA to write, text encoders included.
        model: the parts that it was read for.
        path: the file to write.
        metadata: whether the file says what it is; A1111 hides a LoRA that does not.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    pieces: dict[str, Piece] = {}
    for component, layers in lora.parts.items():
        for layer, factors in layers.items():
            name = _kohya(component, layer, model[component])
            pieces[f"{name}.lora_down.weight"] = _piece(factors.down)
            pieces[f"{name}.lora_up.weight"] = _piece(factors.up)
            alpha = torch.tensor(_alpha(factors), dtype=torch.float32)
            pieces[f"{name}.alpha"] = Piece(alpha.dtype, (), alpha.clone)
    with atomic_path(path) as temporary:
        write_pieces(temporary, pieces, _metadata(lora) if metadata else None)


def save_peft(lora: LoraFile, folder: Path) -> None:
    """Write a LoRA of the UNet as peft's folder, for `PeftModel.from_pretrained(unet, folder)`.

    Raises:
        UserError: it has a part for a text encoder, which such a folder cannot hold; the disk is full or
            cannot be written.
    """
    layers = lora.parts.get("unet", {})
    if others := [component for component in lora.parts if component != "unet"]:
        raise UserError(
            f"{lora.path} has a part for {' and '.join(sorted(others))}, and peft's folder holds one "
            "model's: use --to kohya, which holds all"
        )
    rank = Counter(factors.rank for factors in layers.values()).most_common(1)[0][0]
    alpha = Counter(_alpha(factors) for factors in layers.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        # patterns are regular expressions there
        "rank_pattern": {re.escape(n): f.rank for n, f in sorted(layers.items()) if f.rank != rank},
        "alpha_pattern": {re.escape(n): _alpha(f) for n, f in sorted(layers.items()) if _alpha(f) != alpha},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    pieces = {}
    for layer, factors in layers.items():
        pieces[f"base_model.model.{layer}.lora_A.weight"] = _piece(factors.down)
        pieces[f"base_model.model.{layer}.lora_B.weight"] = _piece(factors.up)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            write_json(temporary / "adapter_config.json", config)
            write_pieces(temporary / "adapter_model.safetensors", pieces, {"format": "pt"})


def _piece(stored: StoredTensor) -> Piece:
    return Piece(DTYPES[stored.dtype], stored.shape, stored.load)


def _alpha(factors: LoraLayer) -> float:
    return factors.scale * factors.rank


def _kohya(component: str, layer: str, part: Part) -> str:
    if component == "unet":
        return kohya_name(layer, residual_layers(part.config))
    number = 1 if component == "text_encoder" else 2
    inner = layer if layer == "text_projection" else f"text_model.{layer}"
    return f"lora_te{number}_{inner.replace('.', '_')}"


def _metadata(lora: LoraFile) -> dict[str, str]:
    ranks = {factors.rank for layers in lora.parts.values() for factors in layers.values()}
    kept = {k: v for k, v in lora.metadata.items() if k.startswith(("ss_", "modelspec.", "mapo_fast."))}
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        **KOHYA_METADATA,
        **kept,
    }
