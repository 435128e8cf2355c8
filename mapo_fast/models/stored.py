"""Tensors where they lie in safetensors files, read one at a time.

A model's tensor is a span of bytes of a file: often a whole tensor of the file, sometimes a third of one, or
its transpose (`original.Place`). Nothing is read before `load`, and what is loaded is a private map of the
file: pages come in as they are copied and belong to the page cache, so that a model of 6.5 GB is never in
memory twice.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mapo_fast.models.original import Place
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorheader import Entry, Header, sampled

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types in safetensors' notation → torch's, for types that torch computes with or converts from."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types that weights may have."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model, and its place in a file."""

    file: Path
    dtype: str
    """Type in safetensors' notation."""
    shape: tuple[int, ...]
    """Shape in the model."""
    begin: int
    """Offset of the first byte in the file."""
    end: int
    transposed: bool = False
    """Whether the file holds the transposed matrix."""

    def load(self) -> Tensor:
        """The tensor on the CPU, in its stored type: a private map of the file.

        Raises:
            OSError: the file cannot be read, or is shorter than its header said.
        """
        stored = self.shape[::-1] if self.transposed else self.shape
        dtype = DTYPES[self.dtype]
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=dtype)
        with self.file.open("rb") as file:
            start = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
            content = mmap.mmap(file.fileno(), self.end - start, access=mmap.ACCESS_COPY, offset=start)
        tensor = torch.frombuffer(content, dtype=torch.uint8, offset=self.begin - start)
        if (self.begin - start) % dtype.itemsize:
            tensor = tensor.clone()  # a header of another length than a multiple of 8
        tensor = tensor.view(dtype).view(stored)
        return tensor.t() if self.transposed else tensor

    def digest(self) -> str:
        """SHA-256 of its first and last `tensorheader.SAMPLE` bytes, in the model's order of elements."""
        if self.transposed:
            content = self.load().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            sample = b"".join(content[begin:end] for begin, end in sampled(0, len(content)))
        else:
            with self.file.open("rb") as file:
                sample = b""
                for begin, end in sampled(self.begin, self.end):
                    file.seek(begin)
                    sample += file.read(end - begin)
        return hashlib.sha256(sample).hexdigest()


def whole(file: Path, entry: Entry) -> StoredTensor:
    """A tensor that a file stores in the model's own form."""
    return StoredTensor(file, entry.dtype, entry.shape, entry.begin, entry.end)


def placed(header: Header, place: Place) -> StoredTensor:
    """The tensor of a model at a place of a file.

    Raises:
        KeyError: the file has no such key.
        UserError: the stored tensor cannot be split as the place says.
    """
    entry = header.tensors[place.key]
    shape = entry.shape
    if place.convolution and shape[2:] == (1, 1):
        shape = shape[:2]
    if place.transposed:
        shape = shape[::-1]
    begin, end = entry.begin, entry.end
    if place.parts > 1:
        if not shape or shape[0] % place.parts:
            raise UserError(
                f"{header.path} has the tensor {place.key} of shape {list(entry.shape)}, which has no "
                f"{place.parts} equal parts: it is damaged or another model's"
            )
        shape = (shape[0] // place.parts, *shape[1:])
        size = (end - begin) // place.parts
        begin, end = begin + place.part * size, begin + (place.part + 1) * size
    return StoredTensor(header.path, entry.dtype, shape, begin, end, place.transposed)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type, each value rounded once, to the nearest.

    torch converts fp64 to narrower types by way of fp32, which rounds twice. Here what fp32 cannot hold is
    rounded to that one of its two neighbours in fp32 whose last bit is 1: a tie in a narrower type is a tie
    in fp32 too, so that no other value is mistaken for one.
    """
    if tensor.dtype != torch.float64 or dtype.itemsize > 2:
        return tensor.to(dtype)
    near = tensor.float()
    error = tensor - near.double()
    even = near.view(torch.int32) % 2 == 0
    towards = torch.where(error > 0, math.inf, -math.inf).float()
    odd = torch.where(error.ne(0) & error.isfinite() & even, torch.nextafter(near, towards), near)
    return odd.to(dtype)


class Loaded(Mapping[str, Tensor]):
    """Stored tensors, each loaded on access and not kept."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the CPU, in its stored type."""
        return self.stored[name].load()

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.stored)


assert sys.byteorder == "little", "safetensors files are little-endian"
