"""Format and size of a PNG, JPEG or WebP file from its first bytes; no pixel is decoded.

Pictures come from anywhere: nothing but bytes is looked at, and no more than `PARTS` parts of a file.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mapo_fast.data.images.png import SIGNATURE
from mapo_fast.util.files import open_regular

PARTS = 10_000
"""Most segments of a JPEG to look at."""
LARGEST = 100_000_000
"""Most pixels of a picture."""
_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""JPEG's markers between 0xC0 and 0xCF that begin no frame."""


class Header(NamedTuple):
    """A picture's format and size."""

    format: str
    width: int
    height: int


def header(path: Path) -> Header:
    """Format and size of a picture.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a picture that can be shown; the text says why.
    """
    with open_regular(path) as file:
        found = _header(file)
    if min(found.width, found.height) < 1:
        raise ValueError("its size is 0")
    if found.width * found.height > LARGEST:
        raise ValueError(f"it has {found.width:,} x {found.height:,} pixels: at most {LARGEST:,} are read")
    return found


def _header(file: BinaryIO) -> Header:
    head = file.read(30)
    if not head:
        raise ValueError("it is empty (0 bytes)")
    if head.startswith(SIGNATURE) and head[12:16] == b"IHDR" and len(head) >= 24:
        return Header("PNG", _big(head[16:20]), _big(head[20:24]))
    if head.startswith(b"\xff\xd8"):
        return _jpeg(file)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) == 30:
        return _webp(head)
    raise ValueError("it is no PNG, JPEG or WebP picture: convert it")


def _jpeg(file: BinaryIO) -> Header:
    file.seek(2)
    for _ in range(PARTS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            break
        if 0xC0 <= head[1] <= 0xCF and head[1] not in _NO_FRAME:
            frame = file.read(5)
            return Header("JPEG", _big(frame[3:5]), _big(frame[1:3]))
        file.seek(_big(head[2:]) - 2, io.SEEK_CUR)
    raise ValueError("it is a JPEG file that is damaged or cut off")


def _webp(head: bytes) -> Header:
    if head[12:16] == b"VP8 ":
        return Header("WEBP", _little(head[26:28]) & 0x3FFF, _little(head[28:30]) & 0x3FFF)
    if head[12:16] == b"VP8L":
        bits = _little(head[21:25])
        return Header("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if head[12:16] == b"VP8X":
        return Header("WEBP", _little(head[24:27]) + 1, _little(head[27:30]) + 1)
    raise ValueError("it is a WebP file of an unknown kind")


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")
