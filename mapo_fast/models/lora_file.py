"""LoRA files as people have them: kohya's, diffusers', peft's, OneTrainer's, ComfyUI's, SimpleTuner's, LoCon.

All of them hold, for a layer with weight W, two factors and perhaps an alpha: the layer computes with
W + (alpha / rank) · up · down. They differ in the names of layers and factors, and in the place of alpha. A
file is known by its keys and shapes; nothing is loaded but the alphas.

Other kinds of adapters are rejected with a message that names the kind: programs that read them do not agree
on what they compute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_fast.models.parts import Part, without_trailing_ones
from mapo_fast.models.recognise import stated_noise
from mapo_fast.models.sdxl import original_layer, residual_layers
from mapo_fast.models.stored import DTYPES, FLOATS, StoredTensor, whole
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import parse_json, read_json
from mapo_fast.util.tensorheader import Header, read_header


class LoraLayer(NamedTuple):
    """The factors of one layer."""

    down: StoredTensor
    """(rank, in), or (rank, in, k, k) of a convolution."""
    up: StoredTensor
    """(out, rank), with trailing ones of a convolution."""
    scale: float
    """alpha / rank."""

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def product(self, shape: tuple[int, ...]) -> Tensor:
        """scale · up · down in fp64, of the layer's shape."""
        up, down = self.up.load().double(), self.down.load().double()
        return (up.flatten(1) @ down.flatten(1)).mul_(self.scale).reshape(shape)

    def identity(self) -> list[Any]:
        """Identity of the layer's product, from a sample of its factors."""
        return [[t.dtype, list(t.shape), t.digest()] for t in (self.down, self.up)] + [self.scale]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, its layers found in a model."""

    path: Path
    parts: Mapping[str, Mapping[str, LoraLayer]]
    """Layers by component and name, as diffusers and transformers name them (`original.canonical`)."""
    metadata: Mapping[str, str]
    prediction: str | None
    """`epsilon` or `v_prediction`, where the file says so."""


def read_lora(path: Path, model: Mapping[str, Part]) -> LoraFile:
    """Find a LoRA's layers in a model.

    Args:
        path: a `.safetensors` file, or peft's folder with `adapter_model.safetensors`.
        model: the model's parts by component.

    Raises:
        UserError: not a LoRA, another kind, for another model, or damaged; the message names the first key.
    """
    path, config = _file_of(path)
    header = read_header(path)
    _refuse_kinds(header, config)
    layers = _names(model)
    factors: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    alphas: dict[tuple[str, str], float] = {}
    seen: set[tuple[tuple[str, str], str]] = set()
    unknown: list[str] = []
    if not config and any(key.startswith("base_model.model.") for key in header.tensors):
        raise UserError(
            f"{path} has peft's names, but no adapter_config.json with its alpha is next to it: name the "
            "folder that peft saved"
        )
    for key, entry in header.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or (place := layers.get(match["layer"])) is None:
            unknown.append(key)
            continue
        stored = whole(path, entry)
        side = "alpha" if match["alpha"] else "down" if match["side"] in _DOWN else "up"
        if (place, side) in seen:
            raise UserError(f"{path} has {shown(key)} twice, under another name too: it is damaged")
        seen.add((place, side))
        if side == "alpha":
            alphas[place] = _scalar(stored, key)
        else:
            factors.setdefault(place, {})[side] = stored
    if not any((match := _FACTOR.fullmatch(key)) and match["side"] for key in header.tensors):
        raise UserError(f"{path} has no LoRA factors: it is not a LoRA")
    if unknown:
        raise UserError(
            f"{path} has {len(unknown)} keys of layers that SDXL does not have, such as {shown(unknown[0])}: "
            "it is a LoRA for another model, or damaged"
        )
    stated = _stated_alphas(header, config)
    parts: dict[str, dict[str, LoraLayer]] = {}
    for (component, layer), pair in factors.items():
        down, up = _checked(path, component, layer, pair, model[component])
        rank = down.shape[0]
        alpha = alphas.get((component, layer))
        scale = stated(component, layer, rank) if alpha is None else alpha / rank
        if not math.isfinite(scale):
            raise UserError(f"{path} has an alpha for {layer} that is not a number: it is damaged")
        parts.setdefault(component, {})[layer] = LoraLayer(down, up, scale)
    said = stated_noise(header)
    return LoraFile(path, parts, header.metadata, said.prediction if said else None)


def is_lora(path: Path) -> bool:
    """Whether a file or folder holds an adapter's factors, of whichever kind.

    Raises:
        UserError: a file that cannot be read as safetensors.
    """
    if path.is_dir():
        return any((path / name).is_file() for name in _FILES)
    return any(_FACTOR.fullmatch(key) or _kind(key) for key in read_header(path).tensors)


def _file_of(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file with the factors, and peft's config next to it."""
    if not path.exists():
        raise UserError(f"LoRA not found: {path} (it must be a .safetensors file, or peft's folder)")
    if path.is_dir():
        named = next((path / name for name in _FILES if (path / name).is_file()), None)
        if named is None:
            raise UserError(f"{path} has no adapter_model.safetensors: name the LoRA's file")
        path = named
    config = path.with_name("adapter_config.json")
    return path, read_json(config) if path.name == _FILES[0] and config.is_file() else {}


_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names under which peft and diffusers save."""


# Rejected kinds

_KINDS = (
    (
        r".*\.(dora_scale|lora_magnitude_vector(\..+)?)",
        "DoRA, whose norm each program takes along another axis",
    ),
    (r".*\.hada_.+", "LoHa (LyCORIS)"),
    (r".*\.lokr_.+", "LoKr (LyCORIS)"),
    (r".*\.(oft_.+|boft_.+)", "OFT"),
    (r".*\.(ia3_l(\..+)?|on_input)", "IA³"),
    (r".*\.[ab][12]\.weight", "GLoRA"),
    (r".*\.lora_mid(\..+)?", "LoCon with Tucker decomposition (lora_mid)"),
    (r".*\.(diff|diff_b|set_weight|w_norm|b_norm)", "a difference of whole layers, not of factors"),
)
_WAY_OUT = "merge it into a model with the program that made it, and start from that"


def _refuse_kinds(header: Header, config: Mapping[str, Any]) -> None:
    for key in header.tensors:
        if what := _kind(key):
            raise UserError(
                f"{header.path} is {what} (key {shown(key)}): only LoRA and LoCon can be used; {_WAY_OUT}"
            )
    metadata = _adapter_metadata(header)
    if config.get("use_dora") or any(metadata.get(name) for name in metadata if name.endswith("use_dora")):
        raise UserError(f"{header.path} is DoRA by its config: only LoRA and LoCon can be used; {_WAY_OUT}")
    version = header.metadata.get("ss_base_model_version", "")
    if version and not version.startswith("sdxl"):
        raise UserError(
            f"{header.path} is for {shown(version)} by its metadata ss_base_model_version, not for SDXL"
        )
    if (width := _text_width(header)) in _OLDER:
        raise UserError(
            f"{header.path} is a LoRA for {_OLDER[width]}, whose text is {width} wide: only one that "
            "was trained on SDXL can be used"
        )


_OLDER = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
"""Models by the width of what their cross-attention reads; SDXL's is 2048."""


def _text_width(header: Header) -> int | None:
    """The width of the text that a LoRA's model reads, where it has a layer that shows it."""
    for key, entry in header.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match and match["side"] in _DOWN and len(entry.shape) > 1 and _READS_TEXT.search(match["layer"]):
            return entry.shape[1]
    return None


_READS_TEXT = re.compile(r"attn2[._](processor[._])?to_[kv]$|^lora_te_text_model_.*_self_attn_[qkv]_proj$")
"""Layers that read text; `lora_te` is the one text encoder of models before SDXL."""


def _kind(key: str) -> str | None:
    """The kind of adapter that a key belongs to, where that kind cannot be used; else None."""
    return next((what for pattern, what in _KINDS if re.fullmatch(pattern, key)), None)


# Names

_DOWN = ("lora_down", "lora_A", "lora_A.default", "lora.down", "lora_linear_layer.down")
_UP = ("lora_up", "lora_B", "lora_B.default", "lora.up", "lora_linear_layer.up")
_FACTOR = re.compile(
    r"(?P<layer>.+?)(?:(?P<alpha>\.alpha)|[._](?P<side>"
    + "|".join(re.escape(side) for side in (*_DOWN, *_UP))
    + r")\.weight)"
)


def _names(model: Mapping[str, Part]) -> dict[str, tuple[str, str]]:
    """All names of all layers that a LoRA may touch, with the component and the layer's own name."""
    found: dict[str, tuple[str, str]] = {}
    for component, part in model.items():
        if component == "vae":
            continue
        layers = [name.removesuffix(".weight") for name, s in part.shapes.items() if len(s) > 1]
        spellings = _unet_spellings(part) if component == "unet" else _text_spellings(component)
        for layer in layers:
            if layer.endswith("embedding"):
                continue
            for name in spellings(layer):
                found[name] = component, layer
    return found


def _unet_spellings(part: Part) -> Callable[[str], Iterator[str]]:
    count = residual_layers(part.config)

    def spellings(layer: str) -> Iterator[str]:
        flat = layer.replace(".", "_")
        yield layer  # this project's checkpoints
        yield from (f"unet.{layer}", f"base_model.model.{layer}", f"base_model.model.unet.{layer}")
        yield from (f"lora_unet_{flat}", f"lycoris_{flat}")
        if match := _ATTENTION.fullmatch(layer):  # diffusers before 0.22
            yield f"unet.{match[1]}.processor.{match[2].removesuffix('.0')}"
            yield f"{match[1]}.processor.{match[2].removesuffix('.0')}"
        try:
            original = original_layer(layer, count)
        except KeyError:
            return
        yield from (f"diffusion_model.{original}", f"model.diffusion_model.{original}")
        yield f"lora_unet_{original.replace('.', '_')}"

    return spellings


_ATTENTION = re.compile(r"(.+\.attn[12])\.(to_q|to_k|to_v|to_out\.0)")


def _text_spellings(component: str) -> Callable[[str], Iterator[str]]:
    number = "1" if component == "text_encoder" else "2"

    def spellings(layer: str) -> Iterator[str]:
        inner = layer if layer == "text_projection" else f"text_model.{layer}"
        for name in dict.fromkeys((inner, layer)):
            flat = name.replace(".", "_")
            yield from (f"lora_te{number}_{flat}", f"{component}.{name}")
            yield f"base_model.model.{component}.{name}"

    return spellings


# Values


def _scalar(stored: StoredTensor, key: str) -> float:
    if math.prod(stored.shape) != 1:
        raise UserError(f"{stored.file} has {shown(key)} of shape {list(stored.shape)}, not one number")
    if stored.dtype not in DTYPES:
        raise UserError(f"{stored.file} has {shown(key)} as {stored.dtype}, which is no alpha's type")
    return float(stored.load().double().reshape(()))


def _adapter_metadata(header: Header) -> dict[str, Any]:
    """The entries that diffusers writes of peft's config: `unet.r`, `unet.lora_alpha`, …"""
    try:
        found = parse_json(header.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{header.path} has metadata lora_adapter_metadata that is not a JSON object")
    return found


def _stated_alphas(header: Header, config: Mapping[str, Any]) -> Callable[[str, str, int], float]:
    """The scale of a layer without an alpha tensor: from peft's config, else 1, as in all programs."""
    metadata = _adapter_metadata(header)

    def scale(component: str, layer: str, rank: int) -> float:
        def of(name: str) -> Any:
            return metadata.get(f"{component}.{name}", config.get(name))

        alpha = of("lora_alpha")
        pattern = of("alpha_pattern")
        try:
            if isinstance(pattern, dict):  # of regular expressions, as peft reads them
                fits = (v for name, v in pattern.items() if re.fullmatch(rf"(.*\.)?({name})", layer))
                alpha = next(fits, alpha)
            if alpha is None:
                return 1.0
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise UserError(f"{header.path} has lora_alpha = {shown(alpha)}, which is not a number")
            return alpha / (math.sqrt(rank) if of("use_rslora") else rank)
        except (re.error, OverflowError) as error:
            raise UserError(f"{header.path} has alphas that cannot be read: {error}") from None

    return scale


def _checked(
    path: Path, component: str, layer: str, pair: Mapping[str, StoredTensor], part: Part
) -> tuple[StoredTensor, StoredTensor]:
    """The two factors of a layer, checked against its shape.

    Raises:
        UserError: a factor is missing, of another shape or type, or not finite.
    """
    if len(pair) != 2:
        raise UserError(f"{path} has one of the two factors of {component}.{layer}: it is damaged")
    down, up = pair["down"], pair["up"]
    shape, cut = part.shapes[f"{layer}.weight"], without_trailing_ones
    rank = down.shape[0] if down.shape else 0
    fits = cut((rank, *shape[1:])) == cut(down.shape) and cut((shape[0], rank)) == cut(up.shape)
    if not rank or not fits or len(down.shape) < 2 or len(up.shape) < 2:
        raise UserError(
            f"{path} has factors of shapes {list(up.shape)} and {list(down.shape)} for {component}.{layer}, "
            f"whose weight is {list(shape)}: it is a LoRA for another model, or damaged"
        )
    for stored in (down, up):
        if stored.dtype not in FLOATS:
            raise UserError(f"{path} has a factor of {component}.{layer} as {stored.dtype}: it is damaged")
        if not torch.isfinite(stored.load().float()).all():
            raise UserError(f"{path} has NaN or infinite values in {component}.{layer}: it is damaged")
    return down, up
