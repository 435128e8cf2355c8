"""Recognise a single safetensors file by its keys and shapes: an SDXL model, a part of one, or another.

The rules are those by which ComfyUI, A1111 and diffusers tell models apart, read from their behaviour: the
prefixes of the parts, the widths of the UNet, and empty tensors as markers of the prediction. A file's name
is not used, and its metadata only where markers are missing.

A file that cannot be trained is rejected with a message that says what it is and what to do instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from mapo_fast.models.original import PREFIXES
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.tensorheader import Header

IGNORED = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.+_cumprod|sqrt_.+m1_alphas_cumprod|log_one_minus_.+|posterior_.+"
    r"|denoiser\.sigmas|v_pred|ztsnr|logvar|model_ema\..+|.*\.position_ids|.*logit_scale"
    r"|first_stage_model\.(loss|model_ema)\..+)"
)
"""Keys that take no part in training: the schedule as tables, markers, constants, the average of a training
that has ended."""


class Noise(NamedTuple):
    """A model's prediction type, and how it is known."""

    prediction: str
    """`epsilon` or `v_prediction`."""
    zero_terminal_snr: bool
    why: str
    stated: bool = True
    """False where neither markers nor metadata name the prediction."""


class Recognised(NamedTuple):
    """An SDXL model in one file."""

    prefixes: dict[str, str]
    """Prefix of the keys of each part in the file."""
    noise: Noise


def recognise(header: Header) -> Recognised:
    """The parts of a model that a file holds, and its prediction.

    Raises:
        UserError: the file is not an SDXL model, or one that cannot be trained.
    """
    keys = header.tensors.keys()
    _refuse_other_files(header)
    found = {part: prefix for part, prefix in PREFIXES.items() if any(k.startswith(prefix) for k in keys)}
    if "unet" not in found:
        _refuse_without_unet(header)
    refuse_other_unets(header, found["unet"])
    known = tuple(found.values())
    more = sorted(key for key in keys if not key.startswith(known) and not IGNORED.fullmatch(key))
    if more:
        _refuse_mixture(header, more)
    return Recognised(found, noise(header))


def noise(header: Header) -> Noise:
    """A model's prediction type: the one that its file names, else epsilon."""
    why = "it has neither a marker v_pred nor metadata that say otherwise"
    return stated_noise(header) or Noise("epsilon", False, why, stated=False)


def stated_noise(header: Header) -> Noise | None:
    """The prediction type that a file names: by its markers, else by its metadata, else None.

    The order is ComfyUI's (`comfy/supported_models.py`), which does not read metadata; there a `ztsnr`
    without `v_pred` has no effect, as epsilon-prediction cannot start from pure noise.
    """
    if "v_pred" in header.tensors:
        zero = "ztsnr" in header.tensors
        return Noise("v_prediction", zero, f"its marker{'s v_pred and ztsnr' if zero else ' v_pred'}")
    for name in ("modelspec.prediction_type", "modelspec.predict_key"):
        said = header.metadata.get(name, "").strip().lower()
        if said in ("v", "v_prediction", "v-prediction"):
            zero = header.metadata.get("ss_zero_terminal_snr", "").lower() == "true"
            return Noise("v_prediction", zero, f"its metadata, {name} = {shown(said)}")
        if said in ("epsilon", "eps"):
            return Noise("epsilon", False, f"its metadata, {name} = {shown(said)}")
    return None


_FEW_STEPS = re.compile(r"\b(turbo|lightning|lcm|hyper-?sd|dmd2?|sdxl-flash)\b", re.IGNORECASE)
_TITLES = ("modelspec.title", "modelspec.architecture", "modelspec.description", "modelspec.merged_from")


def few_steps(metadata: Mapping[str, str]) -> str | None:
    """The reason to think that a model is distilled to sample in a few steps, from its metadata; or None."""
    for name in _TITLES:
        if match := _FEW_STEPS.search(metadata.get(name, "")):
            return f"{name} = {shown(metadata[name])} names {match[0]}"
    return None


# Parts in files of their own


def part_alone(header: Header, component: str) -> str | None:
    """Prefix of a part's keys, in a file that holds it alone or in a model; None for diffusers' names.

    Args:
        header: the file's header.
        component: `unet` or `vae`.

    Raises:
        UserError: the file has no such part.
    """
    _refuse_other_files(header)
    keys = header.tensors.keys()
    inside, original, diffusers = _ALONE[component]
    for prefix in (PREFIXES[component], *inside):
        if prefix + original in keys:
            return prefix
    if diffusers in keys:
        return None
    what = {"unet": "SDXL UNet", "vae": "VAE"}[component]
    _refuse(header, f"has no {what}: its keys begin with {_beginnings(header)}")


_ALONE = {
    "unet": (
        ("diffusion_model.", "unet.", ""),
        "input_blocks.0.0.weight",
        "down_blocks.0.resnets.0.conv1.weight",
    ),
    "vae": (
        ("vae.", ""),
        "encoder.down.0.block.0.conv1.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
    ),
}
"""Other prefixes of a part alone, and a key that it has in the original names and in diffusers'."""


# Rejected files


def _refuse(header: Header, what: str) -> NoReturn:
    raise UserError(f"{header.path} {what}")


_ADAPTERS = re.compile(
    r"(.*\.(lora_(up|down|mid|A|B)\b.*|lora\.(up|down)\..*|lora_linear_layer\..*|dora_scale|hada_w.+|lokr_w.+"
    r"|oft_(blocks|diag).*|diff|diff_b)|lora_(unet|te\d?)_.+)"
)
_SCALED = re.compile(r".*(\.|^)(scaled_fp8|scale_weight|weight_scale|input_scale|comfy_quant)")
_QUANTISED = re.compile(r".*\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB|qweight|qzeros)")
_CONTROL = re.compile(
    r"(control_model|controlnet_(cond_embedding|down_blocks|mid_block)|input_hint_block|zero_convs)\..+"
)


def _refuse_other_files(header: Header) -> None:
    """Raise where the keys are those of an adapter, of quantised weights, or of a model with other inputs."""
    keys = header.tensors
    if not keys:
        _refuse(header, "has no tensors: it is not a model")
    for pattern, what in (
        (
            _ADAPTERS,
            "is a LoRA or another adapter, not a model: name its base as the model, and it as --lora",
        ),
        (
            _SCALED,
            "has scaled fp8 weights (with scale factors), which cannot be trained: take the "
            "model's fp16 or bf16 file",
        ),
        (
            _QUANTISED,
            "has quantised weights, which cannot be trained: take the model's fp16 or bf16 file, and "
            "adapter.base to quantise it here",
        ),
        (_CONTROL, "is a ControlNet, not a model that makes images from a prompt alone"),
    ):
        if any(pattern.fullmatch(key) for key in keys):
            _refuse(header, what)
    if {"edm_mean", "edm_std"} <= keys.keys():
        _refuse(
            header,
            "is a Playground v2.5 model (keys edm_mean and edm_std), which is trained on EDM's noise: "
            "only discrete noise schedules can be trained here",
        )
    if any(key.startswith("edm_vpred.") for key in keys):
        _refuse(
            header,
            "is a v-EDM model such as CosXL (keys edm_vpred.*): only discrete noise schedules can be "
            "trained here",
        )


_FAMILIES = (
    ("cond_stage_model.transformer.", "is a Stable Diffusion 1 model"),
    ("cond_stage_model.model.", "is a Stable Diffusion 2 model"),
    ("model.diffusion_model.joint_blocks.", "is a Stable Diffusion 3 model"),
    ("joint_blocks.", "is a Stable Diffusion 3 model"),
    ("model.diffusion_model.double_blocks.", "is a Flux model, or another transformer"),
    ("double_blocks.", "is a Flux model, or another transformer"),
    ("model.diffusion_model.layers.", "is a transformer (Lumina, Z-Image or another)"),
    ("model.diffusion_model.blocks.", "is a transformer (Wan, Cosmos or another)"),
    ("model.diffusion_model.transformer_blocks.", "is a transformer (PixArt, Qwen-Image or another)"),
    ("transformer_blocks.", "is a transformer (PixArt, Qwen-Image or another)"),
    ("single_transformer_blocks.", "is a transformer (Flux or another)"),
    ("conditioner.embedders.0.model.", "is the SDXL refiner, which has one text encoder"),
)
_ONLY_SDXL = ": only SDXL models can be trained here"


def _refuse_families(header: Header) -> None:
    for prefix, what in _FAMILIES:
        if any(key.startswith(prefix) for key in header.tensors):
            if any(key.startswith(PREFIXES["text_encoder_2"]) for key in header.tensors):
                _refuse(
                    header,
                    f"has keys of two models: of SDXL, and {prefix}*, as if it {what}; take the file of one",
                )
            _refuse(header, what + _ONLY_SDXL)


def _refuse_without_unet(header: Header) -> NoReturn:
    _refuse_families(header)
    keys = header.tensors.keys()
    for component, what in (("unet", "a UNet alone"), ("vae", "a VAE alone")):
        inside, original, diffusers = _ALONE[component]
        if diffusers in keys or any(p + original in keys for p in (PREFIXES[component], *inside)):
            _refuse(
                header, f"is {what}: name a whole model, and this file as --{component} (model.{component})"
            )
    if any(key.startswith(("text_model.", "encoder.layers.", "transformer.resblocks.")) for key in keys):
        _refuse(header, "is a text encoder alone: name a whole model")
    _refuse(
        header,
        f"is not an SDXL model: it has no key that begins with {PREFIXES['unet']}; its keys begin with "
        f"{_beginnings(header)}",
    )


def refuse_other_unets(header: Header, prefix: str) -> None:
    """Raise `UserError` where a UNet in the original names is not SDXL's.

    Args:
        header: the file's header.
        prefix: prefix of the UNet's keys.
    """
    _refuse_families(header)
    shapes = {k.removeprefix(prefix): e.shape for k, e in header.tensors.items() if k.startswith(prefix)}
    first = shapes.get("input_blocks.0.0.weight")
    if first is None or len(first) != 4:
        _refuse(header, f"has no SDXL UNet: {prefix}input_blocks.0.0.weight is missing or no convolution")
    if first[1] == 9:
        _refuse(
            header,
            "is an inpainting model (9 input channels), which cannot be trained here: take the model "
            "that it was made from",
        )
    if first[1] == 8:
        _refuse(
            header,
            "is an editing model (8 input channels: it takes an image next to the noise), which cannot "
            "be trained here",
        )
    if first[1] != shapes.get("out.2.weight", (first[1],))[0]:
        _refuse(
            header,
            f"has {first[1]} input channels, which are not those of the noise alone: only a model that makes "
            "images from a prompt can be trained here",
        )
    if "label_emb.0.0.weight" not in shapes:
        _refuse(
            header,
            "has no SDXL UNet, which takes an image's size (key label_emb.0.0.weight): Stable "
            "Diffusion 1 and 2 do not" + _ONLY_SDXL.replace(":", ";", 1),
        )
    if (width := _context(shapes)) is not None and first[0] == 384 and width == 1280:
        _refuse(header, "is the SDXL refiner" + _ONLY_SDXL)
    _refuse_distilled(header, shapes)


def _context(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Width of the text that a UNet takes."""
    return next((shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), None)


_TRANSFORMER = re.compile(r"((?:input|output)_blocks\.\d+\.1|middle_block\.1)\.transformer_blocks\.(\d+)\..+")


def _refuse_distilled(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise for variants of SDXL with blocks left out; pipeline folders with such UNets are rejected too."""
    depth: dict[str, int] = {}
    for key in shapes:
        if match := _TRANSFORMER.fullmatch(key):
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    widths = {place: _width(shapes, place) for place in depth}
    inputs: dict[int | None, set[int]] = {}
    for place, count in depth.items():
        inputs.setdefault(widths[place], set()).add(count)
    middle = "middle_block.1" in depth and "middle_block.2.out_layers.3.weight" in shapes
    if depth and middle and all(len(counts) == 1 for counts in inputs.values()):
        return
    deepest = max((depth[place] for place in depth if place.startswith("input")), default=0)
    name = {4: "SSD-1B", 2: "Segmind-Vega"}.get(deepest, "SSD-1B, Segmind-Vega or another")
    _refuse(
        header,
        f"is {name}: an SDXL with blocks left out, which cannot be trained here; take the SDXL model itself",
    )


def _width(shapes: Mapping[str, tuple[int, ...]], place: str) -> int | None:
    shape = shapes.get(f"{place}.norm.weight")
    return shape[0] if shape else None


def _refuse_mixture(header: Header, more: list[str]) -> NoReturn:
    """Raise for keys that belong to no part."""
    _refuse_families(header)
    what = f"has {len(more)} keys that belong to no part of an SDXL model, such as {shown(more[0])}"
    if any(key in _DIFFUSERS_KEYS for key in more) or any(key in _BARE_KEYS for key in more):
        what = f"has keys of two models, {PREFIXES['unet']}* and such as {shown(more[0])}"
    _refuse(header, f"{what}: take the file of one model, as it was published")


_DIFFUSERS_KEYS = {diffusers for _, _, diffusers in _ALONE.values()}
_BARE_KEYS = {prefix + original for inside, original, _ in _ALONE.values() for prefix in inside}


def _beginnings(header: Header) -> str:
    """The first parts of a file's keys, most frequent first."""
    firsts = [key.split(".")[0] for key in header.tensors]
    common = sorted(set(firsts), key=lambda first: (-firsts.count(first), first))[:3]
    return ", ".join(shown(first) for first in common)
