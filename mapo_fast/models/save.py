"""Models as files: one `.safetensors` file, or a diffusers pipeline folder; each whole or absent.

Tensors are made and written one at a time. The free space is checked before the first byte, and an existing
target is replaced only after everything is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mapo_fast.models import single_file
from mapo_fast.models.parts import Part
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH, CONFIGS, WEIGHTS, pipeline_index, text_encoder, tokenizer
from mapo_fast.models.stored import DTYPES
from mapo_fast.models.tokenizers import write_clip_tokenizer
from mapo_fast.util.errors import MachineError
from mapo_fast.util.files import atomic_path, disk_errors, write_json
from mapo_fast.util.folders import new_folder
from mapo_fast.util.sizes import size_text
from mapo_fast.util.tensorfile import Piece, write_pieces

_SPARE = 64 * 2**20
"""Bytes that stay free, for headers, configs, and whatever else the machine writes meanwhile."""


def save_single_file(
    model: Pipeline,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    unet: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a model as one file.

    Args:
        model: the model to write.
        path: the file to write.
        dtype, unet: see `single_file.pieces`.
        metadata: the file's metadata, see `single_file.metadata`.

    Returns:
        Hex SHA-256 of the file.

    Raises:
        UserError: a value is NaN, infinite or beyond fp16's range; the disk is full or cannot be written.
    """
    pieces = single_file.pieces(model, dtype=dtype, unet=unet)
    check_space(path, sum(piece.nbytes for piece in pieces.values()))
    with atomic_path(path) as temporary:
        digest = write_pieces(temporary, pieces, metadata)
    return digest


def save_folder(
    model: Pipeline,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    unet: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as a diffusers pipeline folder.

    Args:
        model: the model to write.
        folder: the folder to make or replace.
        dtype: dtype of all weights; None keeps their own.
        unet: trained weights, by diffusers' names, in place of the model's.

    Raises:
        UserError: a value beyond fp16's range; the disk is full or cannot be written; the tokenizers do not
            fit the text encoders.
    """
    for which in BOTH:
        model.load_tokenizer(which)  # a file has none: CLIP's own need not be the model's
    parts = {
        name: _pieces(part, dtype, unet if name == "unet" else None) for name, part in model.parts.items()
    }
    check_space(folder, sum(piece.nbytes for pieces in parts.values() for piece in pieces.values()))
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            for name, pieces in parts.items():
                (temporary / name).mkdir()
                write_json(temporary / name / CONFIGS[name], _config(model, name))
                write_pieces(temporary / name / f"{WEIGHTS[name]}.safetensors", pieces, {"format": "pt"})
            for which in BOTH:
                target = temporary / tokenizer(which)
                if model.tokenizers.root is None:
                    target.mkdir()
                    write_clip_tokenizer(target, which)
                else:
                    shutil.copytree(model.tokenizers.root / tokenizer(which), target)
            (temporary / "scheduler").mkdir()
            write_json(temporary / "scheduler" / CONFIGS["scheduler"], model.scheduler_config)
            sampler = model.scheduler.sampler or str(model.scheduler_config["_class_name"])
            index = pipeline_index(sampler, model.zeros_for_empty_prompt)
            write_json(temporary / "model_index.json", index)


def check_space(target: Path, nbytes: int) -> None:
    """Raise `MachineError` where the file system of a target has no room for so many bytes."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if nbytes + _SPARE > free:
        raise MachineError(
            f"{target} takes {size_text(nbytes)}, the disk has {size_text(free)} free: make room, or write "
            "elsewhere"
        )


def _config(model: Pipeline, component: str) -> dict[str, object]:
    config = dict(model.parts[component].config)
    if component == "text_encoder":
        return {"architectures": ["CLIPTextModel"], **config}
    if component == "text_encoder_2":
        return {"architectures": ["CLIPTextModelWithProjection"], **config}
    return config


def _pieces(part: Part, dtype: torch.dtype | None, trained: Mapping[str, Tensor] | None) -> dict[str, Piece]:
    """A part's tensors under the names that all versions of diffusers and transformers read."""
    shapes, texts = part.shapes, {text_encoder(which) for which in BOTH}
    found = {}
    for name, shape in shapes.items():
        stored = part.stored[name]
        wanted = dtype or (DTYPES[stored.dtype] if trained is None else trained[name].dtype)
        prefix = "text_model." if part.component in texts and name != "text_projection.weight" else ""

        def make(name: str = name, wanted: torch.dtype = wanted, shape: tuple[int, ...] = shape) -> Tensor:
            tensor = part.tensor(name) if trained is None else trained[name].detach().cpu()
            return single_file.converted(tensor, wanted, name).reshape(shape)

        found[prefix + name] = Piece(wanted, shape, make)
    return found
