"""The texts that A1111 and ComfyUI write into a picture's file.

| program      | where                                         | name         |
|--------------|-----------------------------------------------|--------------|
| A1111, Forge | PNG text `parameters`; EXIF comment otherwise | `parameters` |
| ComfyUI      | PNG text `prompt`; EXIF model of a WebP       | `prompt`     |

Pictures come from anywhere: sizes and counts are limited, and nothing but bytes is looked at.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mapo_fast.data.images.png import SIGNATURE, inflated
from mapo_fast.util.errors import MachineError
from mapo_fast.util.files import open_regular, os_error

TEXT_BYTES = 1 << 22
"""Largest text in a picture that is read, in bytes."""
PARTS = 10_000
"""Most parts of a file to look at (PNG's and WebP's chunks, JPEG's segments)."""

_LINE = 20_000
"""Most characters of A1111's settings that are read."""
_FIELD = re.compile(r'(\w[\w \-/]{0,40}): *("(?:[^"\\]|\\.)*"|[^,]*)(?:, *|$)')
_NEGATIVE = "Negative prompt:"
_EXIF_FOLDER, _COMMENT, _MAKE, _MODEL = 0x8769, 0x9286, 0x010F, 0x0110


class NoPromptError(Exception):
    """A picture's prompt, or other text in it, cannot be read; `str()` says why."""


class A1111(NamedTuple):
    """The parts of A1111's text."""

    prompt: str
    negative: str
    settings: str
    """The line that begins with «Steps:»."""


def a1111_parts(text: str) -> A1111:
    """Take A1111's text apart.

    Raises:
        NoPromptError: it is not written as A1111 does.
    """
    lines = text.split("\n")
    steps = [index for index, line in enumerate(lines) if line.startswith("Steps: ")]
    if not steps:
        raise NoPromptError("its text «parameters» has no line «Steps:», as A1111 writes it")
    before, settings = lines[: steps[-1]], lines[steps[-1]]
    ends = [index for index, line in enumerate(before) if line.startswith(_NEGATIVE)]
    end = ends[0] if ends else len(before)
    negative = "\n".join(before[end:]).removeprefix(_NEGATIVE)
    return A1111("\n".join(before[:end]), negative.strip(), settings)


def a1111_fields(settings: str) -> dict[str, str]:
    """The settings in A1111's line, by its names.

    Raises:
        NoPromptError: the line is too long.
    """
    if len(settings) > _LINE:
        raise NoPromptError(f"its settings have more than {_LINE:,} characters")
    return {match[1]: match[2] for match in _FIELD.finditer(settings)}


def picture_texts(path: Path) -> dict[str, str]:
    """The texts `parameters` and `prompt` of a picture's file, as far as it has them.

    Raises:
        NoPromptError: the file cannot be read, or is of another kind.
        MachineError: I/O failed.
    """
    try:
        with open_regular(path) as file:
            return texts_in(file)
    except OSError as error:
        if isinstance(stopped := os_error(error, f"read {path}"), MachineError):
            raise stopped from None
        raise NoPromptError(error.strerror or str(error)) from None


def texts_in(file: BinaryIO) -> dict[str, str]:
    """The texts `parameters` and `prompt` of an open picture.

    Raises:
        NoPromptError: it is of another kind.
    """
    head = file.read(12)
    file.seek(0)
    if head.startswith(SIGNATURE):
        return _png(file)
    if head.startswith(b"\xff\xd8"):
        return _exif(_jpeg_exif(file))
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _exif(_webp_exif(file))
    raise NoPromptError("prompts are read from PNG, JPEG and WebP files")


# --- PNG ---


def _png(file: BinaryIO) -> dict[str, str]:
    """The texts before the pixels."""
    texts: dict[str, str] = {}
    file.seek(len(SIGNATURE))
    for _ in range(PARTS):
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or kind in (b"IDAT", b"IEND"):
            break
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or length > TEXT_BYTES:
            file.seek(length + 4, io.SEEK_CUR)
            continue
        body, checksum = file.read(length), file.read(4)
        if zlib.crc32(kind + body).to_bytes(4, "big") == checksum:
            keyword, _, rest = body.partition(b"\0")
            text = _png_text(kind, rest)
            if keyword in (b"parameters", b"prompt") and text is not None:
                texts.setdefault(keyword.decode(), text)
    return texts


def _png_text(kind: bytes, rest: bytes) -> str | None:
    """The text of a chunk after its keyword; None where it is damaged or too large."""
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    data: bytes | None = rest
    if kind == b"zTXt":
        data = rest[1:]
    elif kind == b"iTXt":
        data = rest[2:].split(b"\0", 2)[-1]
    if packed:
        data = inflated(data or b"", TEXT_BYTES)
    try:
        return None if data is None else data.decode("utf-8" if kind == b"iTXt" else "latin-1")
    except UnicodeDecodeError:
        return None


# --- EXIF ---


def _jpeg_exif(file: BinaryIO) -> bytes:
    file.seek(2)
    for _ in range(PARTS):
        head = file.read(4)
        length = int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xD9, 0xDA) or length < 2:
            break
        if head[1] == 0xE1 and (body := file.read(length - 2)).startswith(b"Exif\0\0"):
            return body[6:]
        if head[1] != 0xE1:
            file.seek(length - 2, io.SEEK_CUR)
    return b""


def _webp_exif(file: BinaryIO) -> bytes:
    file.seek(12)
    for _ in range(PARTS):
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if len(head) < 8:
            break
        if head[:4] == b"EXIF":
            return file.read(length).removeprefix(b"Exif\0\0") if length <= TEXT_BYTES else b""
        file.seek(length + length % 2, io.SEEK_CUR)
    return b""


def _exif(tiff: bytes) -> dict[str, str]:
    """A1111's comment, and what ComfyUI writes into the names of camera and maker."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    texts: dict[str, str] = {}
    if order is None:
        return texts
    try:
        tags = dict(_tags(tiff, order, *struct.unpack_from(f"{order}I", tiff, 4)))
        if len(folder := tags.get(_EXIF_FOLDER, b"")) == 4:
            tags |= dict(_tags(tiff, order, *struct.unpack(f"{order}I", folder)))
    except struct.error:
        return texts
    if (comment := _comment(tags.get(_COMMENT, b""))) is not None:
        texts["parameters"] = comment
    for tag in (_MODEL, _MAKE):
        if tags.get(tag, b"").startswith(b"prompt:"):
            texts["prompt"] = tags[tag].removeprefix(b"prompt:").rstrip(b"\0").decode("utf-8", "replace")
    return texts


def _tags(tiff: bytes, order: str, at: int) -> Iterator[tuple[int, bytes]]:
    """A folder's tags with their bytes: texts, comments and the places of other folders."""
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    for index in range(min(count, PARTS)):
        tag, kind, items = struct.unpack_from(f"{order}HHI", tiff, at + 2 + 12 * index)
        value = at + 10 + 12 * index
        size = {1: 1, 2: 1, 4: 4, 7: 1}.get(kind, 0) * items
        if size > 4:
            (value,) = struct.unpack_from(f"{order}I", tiff, value)
        if size:
            yield tag, tiff[value : value + size]


def _comment(data: bytes) -> str | None:
    """The text of an EXIF comment where it is A1111's."""
    code, text = data[:8], data[8:]
    ways = {b"UNICODE\0": ("utf-16-be", "utf-16-le"), b"ASCII\0\0\0": ("utf-8",)}.get(code, ())
    for way in ways:  # not every program keeps to the byte order of the file
        try:
            found = text.decode(way)
        except UnicodeDecodeError:
            continue
        if "Steps: " in found:
            return found
    return None
