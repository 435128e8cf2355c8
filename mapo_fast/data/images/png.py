"""Removes parts of PNG files for which Pillow would reject them although their pixels are whole.

Pillow gives up a PNG whose compressed text or colour profile unpacks to more than 1 MiB (the workflows that
ComfyUI stores do), or whose text is damaged. Its limits are settings of the whole process, so the file is
changed instead: text is left out, except for what holds the orientation, and the profile is taken out.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_BYTES = (1 << 20) - 1
PROFILE_BYTES = 1 << 24
_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")


def without_text(data: bytes) -> tuple[bytes, bytes | None]:
    """The file without its text and its colour profile; and the profile.

    The profile is None where there is none, and empty where it cannot be unpacked to `PROFILE_BYTES` or less.
    """
    profile: bytes | None = None
    left, kept, start, at = [], set(), 0, len(SIGNATURE)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            break
        drop = False
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            body = data[at + 8 : end - 4]
            keyword = body.partition(b"\0")[0]
            if kind == b"iCCP":
                drop, profile = True, inflated(body[len(keyword) + 2 :], PROFILE_BYTES) or b""
            else:
                whole = zlib.crc32(kind + body).to_bytes(4, "big") == data[end - 4 : end]
                small = whole and keyword in _ORIENTATION and keyword not in kept and _is_small(kind, body)
                drop = not small
                kept.add(keyword)
        if drop:
            left.append(data[start:at])
            start = end
        at = end
        if kind == b"IEND":
            break
    return (b"".join([*left, data[start:]]) if left else data), profile


def _is_small(kind: bytes, body: bytes) -> bool:
    """Whether a text chunk unpacks to at most `TEXT_BYTES`."""
    _, _, rest = body.partition(b"\0")
    if kind == b"zTXt":
        return inflated(rest[1:], TEXT_BYTES) is not None
    if kind == b"iTXt" and rest[:1] == b"\1":
        return inflated(rest[2:].split(b"\0", 2)[-1], TEXT_BYTES) is not None
    return len(body) <= TEXT_BYTES


def inflated(data: bytes, limit: int) -> bytes | None:
    """The unpacked bytes; None where they are damaged or more than `limit`."""
    unpacker = zlib.decompressobj()
    try:
        out = unpacker.decompress(data, limit)
    except zlib.error:
        return None
    return out if unpacker.eof else None
