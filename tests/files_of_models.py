"""Single-file checkpoints for tests, made from pipeline folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models import single_file
from mapo_fast.models.open import open_sdxl
from mapo_fast.util.tensorfile import write_pieces

Tensors = dict[str, torch.Tensor]


def make_file(folder: Path, path: Path, *, dtype: torch.dtype | None = torch.float32) -> Path:
    """A pipeline folder as one file, as this project writes it."""
    model = open_sdxl(folder)
    write_pieces(path, single_file.pieces(model, dtype=dtype), single_file.metadata(model))
    return path


def edit_file(path: Path, edit: Callable[[Tensors], Any], **metadata: str) -> Path:
    """Change a file's tensors in place; metadata are added to what it has."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        known = dict(file.metadata() or {})
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=known | metadata)
    return path
