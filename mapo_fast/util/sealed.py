"""Files that say what they are and are checked as they are read: against damage and mix-ups, not attackers.

JSON        an object; its entry `sha256` is that of all other entries (written without spaces, keys sorted)
tensors     a safetensors file; of its metadata, `is` is JSON of what the file is (whose, which step, which
            position), and `sha256` that of `is` and of every tensor's name, dtype, shape and bytes
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mapo_fast.util.files import atomic_path, disk_errors, write_json
from mapo_fast.util.tensorfile import write_tensors


class WrongFileError(ValueError):
    """A file that is not what it should be. The text says why and follows the file's name."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, atomically.

    Raises:
        UserError: as `files.disk_errors`.
    """
    write_json(path, {**record, "sha256": _checksum(record)})


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The object that was given to `write_record`, from what stands in the file.

    Raises:
        WrongFileError: it is another one.
    """
    given = {name: value for name, value in record.items() if name != "sha256"}
    try:
        whole = record.get("sha256") == _checksum(given)
    except RecursionError:
        whole = False
    if not whole:
        raise WrongFileError("does not match its checksum")
    return given


def write_sealed(path: Path, what: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with what they are and a checksum, atomically.

    Raises:
        UserError: as `files.disk_errors`.
    """
    is_ = _plain(what)
    metadata = {"is": is_, "sha256": _digest(is_, tensors)}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def read_sealed(path: Path, what: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that `write_sealed` wrote for the same `what`, on the CPU; None where no file is.

    Raises:
        WrongFileError: damaged, or the file is another one under this name.
    """
    if not os.path.lexists(path):
        return None
    metadata, tensors = open_tensors(path)
    if "is" not in metadata or metadata.get("sha256") != _digest(metadata["is"], tensors):
        raise WrongFileError("does not match its checksum")
    if metadata["is"] != _plain(what):
        raise WrongFileError(f"is another file under this name: {metadata['is']}")
    return tensors


def open_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a regular safetensors file.

    Raises:
        WrongFileError: it cannot be read.
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


def _plain(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of what the record is after it was written and read."""
    return hashlib.sha256(_plain(json.loads(json.dumps(record))).encode()).hexdigest()


def _digest(is_: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(is_.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
