"""A model as one safetensors file in the layout that ComfyUI, A1111 and diffusers read.

Tensors are made one at a time as they are written: no second model is ever in memory. Parts that come out of
a single file and keep their type are copied byte by byte. What the model predicts is said twice: by the empty
tensors that ComfyUI and A1111 look for, and in `modelspec.*`, which kohya's scripts and galleries read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mapo_fast.models.original import PREFIXES, Place, places
from mapo_fast.models.parts import CONFIGS_KEY, NAMES, Part, fields_to_state
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.recognise import IGNORED
from mapo_fast.models.stored import DTYPES, rounded, whole
from mapo_fast.models.trial import Shapes
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorfile import Piece

DTYPE = torch.float16
"""Default type of weights that come from a folder."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class _Source(NamedTuple):
    """A tensor of the model, and where the file has it."""

    name: str
    place: Place


def pieces(
    model: Pipeline, *, dtype: torch.dtype | None = None, unet: Mapping[str, Tensor] | None = None
) -> dict[str, Piece]:
    """All tensors of the file, by key.

    Args:
        model: the model to write.
        dtype: dtype of all weights; None keeps those of a single file, and takes fp16 for a folder's. A
            trained UNet is never written in fp8: it would lose what was learnt.
        unet: trained weights, by diffusers' names, in place of the model's.

    Raises:
        UserError: the original code has no name for a layer. Raised as a piece is made: a value is NaN,
            infinite or beyond fp16's range.
    """
    found: dict[str, Piece] = {}
    for component, prefix in PREFIXES.items():
        part = model.parts[component]
        trained = unet if component == "unet" else None
        for key, sources in _by_key(part).items():
            found[prefix + key] = _piece(prefix + key, part, sources, dtype, trained)
        found.update(_constants(part))
    return found | markers(model)


def not_carried_over(model: Pipeline, dtype: torch.dtype | None) -> str:
    """Warning where a file's text encoders or VAE are written in another type than theirs, or ""."""
    changed = [
        NAMES[name]
        for name, part in model.parts.items()
        if name != "unet" and part.header is not None
        if dtype is not None and {DTYPES[stored.dtype] for stored in part.stored.values()} != {dtype}
    ]
    if not changed:
        return ""
    to = str(dtype).removeprefix("torch.")
    return f"converted to {to}, not carried over bit by bit: {', '.join(changed)}"


def markers(model: Pipeline) -> dict[str, Piece]:
    """The empty tensors by which ComfyUI and A1111 know v-prediction and zero terminal SNR."""
    config = model.scheduler_config
    if config.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if config.get("rescale_betas_zero_snr") else ["v_pred"]
    return {name: Piece(torch.float32, (0,), partial(torch.empty, 0)) for name in names}


def metadata(model: Pipeline) -> dict[str, str]:
    """The file's metadata: the prediction for other programs, and fields of configs for this one.

    Author and licence are copied from the start model's file.
    """
    v = model.scheduler_config.get("prediction_type") == "v_prediction"
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.predict_key": "v" if v else "epsilon",
        "modelspec.resolution": "1024x1024",
    }
    stated = {
        component: fields
        for component, part in model.parts.items()
        if (fields := fields_to_state(part, _original_shapes(part)))
    }
    if stated:
        found[CONFIGS_KEY] = json.dumps(stated, sort_keys=True)
    source = model.parts["unet"].header
    kept = {} if source is None else source.metadata
    return found | {name: kept[name] for name in _KEPT if name in kept}


_KEPT = ("modelspec.title", "modelspec.author", "modelspec.license")


def _by_key(part: Part) -> dict[str, list[_Source]]:
    """The tensors that make each key of the file, in their order, without the part's prefix."""
    found: dict[str, list[_Source]] = {}
    try:
        for name, place in places(part.component, part.shapes, part.config).items():
            found.setdefault(place.key, []).append(_Source(name, place))
    except KeyError as error:
        raise UserError(
            f"{part.where} has the layer {error.args[0]}, for which single files have no name: write a "
            "diffusers folder"
        ) from None
    for sources in found.values():
        sources.sort(key=lambda source: source.place.part)
    return found


def _original_shapes(part: Part) -> Shapes:
    shapes = part.shapes
    return {key: _original_shape(sources, shapes) for key, sources in _by_key(part).items()}


def _original_shape(sources: list[_Source], shapes: Shapes) -> tuple[int, ...]:
    place, shape = sources[0].place, shapes[sources[0].name]
    if place.transposed:
        shape = shape[::-1]
    if place.parts > 1:
        shape = (shape[0] * place.parts, *shape[1:])
    return (*shape, 1, 1) if place.convolution else shape


def _piece(
    key: str,
    part: Part,
    sources: list[_Source],
    dtype: torch.dtype | None,
    trained: Mapping[str, Tensor] | None,
) -> Piece:
    kept = DTYPE if part.header is None else DTYPES[part.stored[sources[0].name].dtype]
    if kept in _FP8 and (trained is not None or part.added):
        kept = DTYPE
    wanted, shapes = dtype or kept, part.shapes
    shape = _original_shape(sources, shapes)

    def make() -> Tensor:
        tensors = []
        for name, place in sources:
            tensor = part.tensor(name) if trained is None else trained[name].detach().cpu()
            tensor = converted(tensor, wanted, key).reshape(shapes[name])
            tensors.append(tensor.t() if place.transposed else tensor)
        return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).reshape(shape)

    return Piece(wanted, shape, make)


def converted(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A tensor rounded to a type.

    Raises:
        UserError: a value is NaN or infinite, or beyond the type's range, naming the tensor.
    """
    found = rounded(tensor, dtype)
    if _finite(found):
        return found
    if not _finite(tensor):
        raise UserError(f"{key} has NaN or infinite values: the model is damaged; copy or download it again")
    largest = float(tensor.abs().max())
    if dtype is torch.float16:
        raise UserError(
            f"{key} has a value of {largest:.4g}, beyond fp16's range of 65504: write bf16 (--dtype bf16)"
        )
    raise UserError(f"{key} has a value of {largest:.4g}, beyond {dtype}'s range: merge at a lower weight")


def _finite(tensor: Tensor) -> bool:
    known = tensor.bfloat16() if tensor.dtype in _FP8 else tensor  # torch does not know it of fp8
    return bool(known.isfinite().all())


def _constants(part: Part) -> Iterator[tuple[str, Piece]]:
    """Tensors of a source file besides a text encoder's or VAE's weights, such as the positions 0, 1, 2, …"""
    if part.header is None or part.component == "unet":
        return
    for key, entry in part.header.tensors.items():
        if key.startswith(PREFIXES[part.component]) and IGNORED.fullmatch(key) and entry.dtype in DTYPES:
            yield key, Piece(DTYPES[entry.dtype], entry.shape, whole(part.header.path, entry).load)
