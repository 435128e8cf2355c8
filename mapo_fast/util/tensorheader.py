"""The header of a safetensors file, read without its tensors and distrusted.

The first few hundred kilobytes of a 6.5 GB file tell its tensors, their types and shapes, and where each one
lies. The format (https://huggingface.co/docs/safetensors) allows neither gaps nor overlaps, so a file that
was cut off, or that reads one tensor's bytes as another's, is noticed here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import open_regular, os_error

HEADER_BYTES = 100_000_000
"""Longest header; safetensors itself reads no longer ones."""
SAMPLE = 4096
"""Bytes at each end of a tensor that identify its contents."""

BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F4": 4,
}
"""Bits of an element of each type that a file may hold."""


class Entry(NamedTuple):
    """A tensor's entry in a header."""

    dtype: str
    """Type in safetensors' notation: `F16`, `BF16`, `F32`, …"""
    shape: tuple[int, ...]
    begin: int
    """Offset of the tensor's first byte, from the start of the file."""
    end: int


class Header(NamedTuple):
    """The header of a safetensors file."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    text: bytes
    """The header's bytes in the file."""


def read_header(path: Path) -> Header:
    """Read and check a file's header; nothing else is read.

    Raises:
        UserError: the file cannot be read, is of another format, or its header does not describe it.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            if start[8:] != b"{":
                _check_format(start)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > min(size - 8, HEADER_BYTES):
                raise ValueError(
                    "its header is longer than the file or than 100 MB; it was cut off or damaged"
                )
            file.seek(8)
            text = file.read(length)
        tensors, metadata = _parse(text)
        entries = {name: _entry(name, stated, 8 + length) for name, stated in tensors.items()}
        _check_places(entries, 8 + length, size)
    except OSError as error:
        raise os_error(error, f"read {path}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read as safetensors: its header is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    return Header(path, entries, metadata, text)


def samples(header: Header) -> Iterator[tuple[str, bytes]]:
    """The first and the last `SAMPLE` bytes of every tensor, by name, in the order of names."""
    with header.path.open("rb") as file:
        for name, entry in sorted(header.tensors.items()):
            yield name, b"".join(_read(file, *span) for span in sampled(entry.begin, entry.end))


def sampled(begin: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two spans of bytes that are sampled of those from `begin` to `end`."""
    return (begin, min(begin + SAMPLE, end)), (max(begin, end - SAMPLE), end)


def weights_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's size, header, and the first and last 4 KiB of every tensor.

    Raises:
        UserError: the file cannot be read as safetensors.
    """
    header = read_header(path)
    digest = hashlib.sha256(str(path.stat().st_size).encode() + header.text)
    for _, sample in samples(header):
        digest.update(sample)
    return digest.hexdigest()


def _read(file: Any, begin: int, end: int) -> bytes:
    file.seek(begin)
    found: bytes = file.read(end - begin)
    return found


def _check_format(start: bytes) -> None:
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ValueError(
            "it is a pickle (.ckpt, .pt), which can run code when it is opened; take the .safetensors file"
        )
    if start.startswith(b"GGUF"):
        raise ValueError("it is a GGUF file of quantised weights; take the model's .safetensors file")


def _parse(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata in a header's JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise ValueError(f"its header has {shown(twice)} twice")
        return found

    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a table of texts")
    return header, metadata


def _entry(name: str, stated: Any, start: int) -> Entry:
    if not isinstance(stated, Mapping):
        raise ValueError(f"its header does not describe the tensor {shown(name)}")
    dtype: Any = stated.get("dtype")
    shape: Any = stated.get("shape")
    offsets: Any = stated.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"the tensor {shown(name)} is of the unknown type {shown(dtype)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"its header does not say where the tensor {shown(name)} is")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if 8 * (end - begin) != bits:
        raise ValueError(f"the tensor {shown(name)} has {end - begin} bytes, its type and shape {bits // 8}")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _whole_numbers(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) < 16 and all(type(n) is int and 0 <= n < 2**60 for n in value)
    )


def _check_places(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Check that the tensors follow each other, without gaps, to the end of the file."""
    last = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise ValueError(
                f"the tensor {shown(name)} lies outside the file, which is {entry.end - size} bytes too "
                "short: it was cut off; copy or download it again"
            )
        if entry.begin != last:
            what = "overlaps another" if entry.begin < last else "has bytes before it that belong to none"
            raise ValueError(f"the tensor {shown(name)} {what}")
        last = entry.end
    if last != size:
        raise ValueError(f"its last {size - last} bytes belong to no tensor")
