"""Weights of scorers: safetensors, or PyTorch's files read without unpickling objects."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mapo_fast.util.errors import UserError
from mapo_fast.util.files import sha256_file
from mapo_fast.util.tensorheader import read_header

_LARGEST = 24 * 2**30
"""Bytes: the largest scorer in use, a 7B model in fp16, has 16 GB."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, on the CPU, and the file's SHA-256.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, or a folder with `model.safetensors`.

    Raises:
        UserError: missing, too large, damaged, or a pickle of other objects than tensors.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is no file: name the scorer's weights, a .safetensors or .pt file")
    if file.stat().st_size > _LARGEST:
        raise UserError(f"{file} has {file.stat().st_size / 2**30:.0f} GiB: no scorer is that large")
    if file.suffix == ".safetensors":
        read_header(file)  # says what is wrong with it in one line
        return load_file(file), sha256_file(file)
    return _tensors(_unpickled(file), file), sha256_file(file)


def _unpickled(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: it is read as it comes
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file} holds no plain tensors ({why[:200]}): save it as .safetensors; pickles are never run"
        ) from None


def _tensors(found: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise UserError(f"{file} holds no table of tensors by name: it is not a scorer's weights")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}
