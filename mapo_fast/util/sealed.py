"""Files of tensors that say what they are and are checked as they are read: the tensors' `records.py`.

Each is a safetensors file. Its metadata has `is`, JSON that identifies the file (run, step, position), and
`sha256`, over `is` and every tensor's name, dtype, shape and bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mapo_fast.util.files import atomic_path, disk_errors
from mapo_fast.util.records import WrongFileError, plain
from mapo_fast.util.tensorfile import write_tensors


def write_sealed(path: Path, what: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their identification and a checksum, atomically.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    is_ = plain(what)
    metadata = {"is": is_, "sha256": _digest(is_, tensors)}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def read_sealed(path: Path, what: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that `write_sealed` wrote for the same `what`, on the CPU; None where no file is.

    Raises:
        WrongFileError: the file is damaged, or is another file under this name.
    """
    if not os.path.lexists(path):
        return None
    metadata, tensors = open_tensors(path)
    if "is" not in metadata or metadata.get("sha256") != _digest(metadata["is"], tensors):
        raise WrongFileError("does not match its checksum")
    if metadata["is"] != plain(what):
        raise WrongFileError(f"is another file under this name: {metadata['is']}")
    return tensors


def open_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a regular safetensors file.

    Raises:
        WrongFileError: the file cannot be read.
    """
    if not path.is_file():  # a FIFO would hang
        raise WrongFileError("is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            # copies: what is mapped changes with the file, and Windows replaces no mapped file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except OSError as error:
        raise WrongFileError(f"cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise WrongFileError(f"is not a safetensors file ({error})") from None


def _digest(is_: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(is_.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
