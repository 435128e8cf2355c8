"""Writing safetensors files one tensor at a time, hashed on the way.

`safetensors.torch.save_file` brings every CUDA tensor to the host before it writes the first byte, and older
versions turn all of them into Python bytes: a second full copy of the model in memory at the worst moment.
The format is simple enough to stream:

    8 bytes   little-endian length of the header
    header    JSON: name -> dtype, shape, [begin, end) in the data; padded with spaces to 8 bytes
    data      the tensors' contiguous bytes, widest dtype first so that each one is aligned

Peak extra memory is one tensor, and only if it is not a contiguous CPU tensor already. The files are read
with the safetensors library itself.

Equal tensors give equal bytes, and the umask decides who may read them. `save_file` puts metadata in a random
order and makes files that only their owner can read; `rewrite` fixes both in files of other libraries.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Piece(NamedTuple):
    """A tensor that is made just before it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Makes the tensor, on any device, with any strides."""

    @property
    def nbytes(self) -> int:
        """The tensor's size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write `tensors` (any device, any strides, shared storage allowed) to `path` and fsync it.

    Returns:
        Hex SHA-256 of the file's bytes.

    Raises:
        TypeError: a dtype that safetensors files cannot hold here.
        OSError: from the file system; nothing is cleaned up.
    """
    pieces = {
        name: Piece(tensor.dtype, tuple(tensor.shape), partial(_same, tensor))
        for name, tensor in tensors.items()
    }
    return write_pieces(path, pieces, metadata)


def write_pieces(path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors that are made one at a time, so that one is in memory at once, plus its source.

    Returns and raises what `write_tensors` does, and raises what `make` raises.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        piece = pieces[name]
        if piece.dtype not in _DTYPES:
            raise TypeError(f"{name}: {piece.dtype} cannot be saved")
        end = offset + piece.nbytes
        header[name] = {
            "dtype": _DTYPES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            digest.update(data)
            _write(file, data)

        put(memoryview(len(head).to_bytes(8, "little")))
        put(memoryview(head))
        for name in order:
            put(_bytes(pieces[name].make()))  # no local variable: it would keep one while the next is made
        os.fsync(file.fileno())
    return digest.hexdigest()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def rewrite(path: Path, more: Mapping[str, str] | None = None) -> None:
    """Write a small safetensors file again as `write_tensors` does, with more metadata; not atomic."""
    with safe_open(path, framework="pt") as file:
        metadata = {**(file.metadata() or {}), **(more or {})}
    tensors = load(path.read_bytes())
    path.unlink()
    write_tensors(path, tensors, metadata)


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in logical order; the memory is its own if it is a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _write(file: object, data: memoryview) -> None:
    """An unbuffered write may be partial (Linux stops at 2 GiB): go on until all is written."""
    while data:
        data = data[file.write(data) :]  # type: ignore[attr-defined]
