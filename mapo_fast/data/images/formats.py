"""Image formats that are decoded, and the kinds of files that cannot be."""

from __future__ import annotations

from functools import cache

from PIL import Image

_DECODED = (
    "JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI", "PSD", "SGI", "PCX",
    "ICO", "TGA",
)  # fmt: skip
"""Formats that Pillow decodes in this process. For others it starts programs (PostScript: Ghostscript)."""

_SIGNS = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)"),
    (b"%PDF", "PDF"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x01\0\0\0", "EMF"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"II\xbc", "JPEG XR"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"SIMPLE  =", "FITS"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an OLE file (FlashPix, MIC)"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file"),
)
_DAMAGED = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "PSD"),
    (b"qoif", "QOI"),
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")


@cache
def decoded_formats() -> tuple[str, ...]:
    """The formats to open images with, as Pillow calls them; AVIF where this Pillow has it."""
    Image.init()
    return tuple(name for name in _DECODED if name in Image.OPEN)


def what_it_is(data: bytes) -> tuple[str, str]:
    """Reason and detail for a file that Pillow does not recognise as an image."""
    head = data[:1000]
    if head.startswith(_POINTER):
        return "unreadable image", "a Git LFS pointer, not the file: run git lfs pull in the data set"
    if name := _container(head) or next((name for sign, name in _SIGNS if head.startswith(sign)), ""):
        return "unsupported format", f"{name}: convert it to PNG or JPEG"
    damaged = next((name for sign, name in _DAMAGED if head.startswith(sign)), "")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        damaged = "WebP"
    if damaged:
        return "unreadable image", f"a {damaged} file that is damaged or of a rare kind"
    return "unreadable image", f"no image of a known format; its first bytes are {head[:8].hex(' ')}"


def _container(head: bytes) -> str:
    """The format of a file whose name of it follows the first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<"):
        kinds = ((b"<svg", "SVG"), (b"<html", "a web page"), (b"<!doctype html", "a web page"))
        return next((name for sign, name in kinds if sign in text), "XML")
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(head[3], 64), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF, which this Pillow cannot read" if "AVIF" not in decoded_formats() else ""
        if head[8:12] == b"crx ":
            return "a camera's raw file"
        return "HEIC" if brands & set(_HEIF) else "a video"
    return ""
