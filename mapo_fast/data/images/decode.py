"""From an image file's bytes to 8-bit sRGB pixels, with one defined outcome for everything found in the wild.

| image                                       | outcome                                              |
|---------------------------------------------|------------------------------------------------------|
| RGB, grey, 1-bit, palette, YCbCr, Lab, HSV  | converted to RGB                                     |
| CMYK without a profile                      | converted to RGB by formula                          |
| ICC profile of RGB, grey or CMYK            | converted to sRGB (`colour`)                         |
| damaged or unfitting ICC profile            | ignored                                              |
| ICC profile of a JPEG 2000 or GIF           | not read (Pillow does not give it)                   |
| PNG's gAMA, cHRM and cICP, AVIF's nclx      | not read: taken as sRGB                              |
| alpha (RGBA, grey + alpha, palette + alpha) | composited on white                                  |
| 12- and 16-bit grey                         | scaled to 8 bits (v / 257 for 16 bits, rounded)      |
| 16-bit RGB                                  | the high byte of each value (Pillow's decoder)       |
| EXIF-rotated                                | turned upright; an unreadable EXIF block is ignored  |
| animated                                    | the first frame                                      |
| PNG with large or damaged text              | its pixels (`png`)                                   |
| floating-point pixels, 32-bit or signed     | skipped: "unsupported pixel format"                  |
| zero bytes                                  | skipped: "zero-byte image"                           |
| HEIC, JPEG XL, PostScript, SVG, …           | skipped: "unsupported format" (`formats`)            |
| not an image, or damaged                    | skipped: "unreadable image"                          |
| cut off                                     | skipped: "truncated image"                           |
| more than `MAX_PIXELS` pixels               | skipped: "decompression bomb", before it is decoded  |

Nothing outside this process decodes an image, no warning escapes and no setting of Pillow is changed.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mapo_fast.data.images import png
from mapo_fast.data.images.colour import Profile, to_srgb
from mapo_fast.data.images.formats import decoded_formats, what_it_is
from mapo_fast.data.images.libtiff import captured

# What Pillow logs of a damaged file is in its error too; without a handler Python prints it on the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

MAX_PIXELS = 100_000_000
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class ImageProblemError(Exception):
    """An image that cannot be used; `reason` is the table's, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Decoded(NamedTuple):
    """An upright image in mode RGB, and the outcome of its colour profile."""

    image: Image.Image
    profile: Profile


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as `decode` does, without the outcome of its colour profile."""
    return decode(data, max_pixels=max_pixels).image


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """The image in mode RGB and in sRGB, upright.

    Raises:
        ImageProblemError: see the module's table.
    """
    if not data:
        raise ImageProblemError("zero-byte image", "it has no bytes")
    profile: bytes | None = None
    if data.startswith(png.SIGNATURE):
        data, profile = png.without_text(data)
    said: list[str] = []
    with _quiet, captured(said) if data.startswith(_TIFF) else nullcontext():
        try:
            image = Image.open(io.BytesIO(data), formats=decoded_formats())
        except Image.DecompressionBombError as error:
            raise ImageProblemError("decompression bomb", str(error)) from None
        except UnidentifiedImageError:
            raise ImageProblemError(*what_it_is(data)) from None
        except Exception as error:  # decoders of damaged files raise almost anything
            raise ImageProblemError("unreadable image", _first_line(error)) from None
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageProblemError("decompression bomb", f"{width}×{height} pixels, limit {max_pixels}")
            try:
                image.load()
                white, inverted = _white(image)
                return _finished(_upright(image), profile, white, inverted)
            except ImageProblemError:
                raise
            except Exception as error:
                problem = error
    text = " ".join([_first_line(problem), *said[:1]])
    cut_off = any(word in text.lower() for word in ("truncated", "unexpected end", "eof"))
    reason = "truncated image" if cut_off or isinstance(problem, EOFError) else "unreadable image"
    raise ImageProblemError(reason, text) from None


class _Quiet:
    """No warnings of Pillow while any thread decodes; `warnings.catch_warnings` alone is for one thread."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing reliable about orientation; the pixels are fine
        return image


def _white(image: Any) -> tuple[int, bool]:
    """Full brightness of a grey image of more than 8 bits, and whether its values mean darkness instead.

    Raises:
        ImageProblemError: its values have no known range.
    """
    if image.mode == "F":
        raise ImageProblemError("unsupported pixel format", "floating-point pixels")
    if not image.mode.startswith("I"):
        return 255, False
    if image.format == "TIFF" and image.mode != "I":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]
        return 2**bits - 1, image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if image.mode != "I" or image.format == "PPM":  # Pillow scales what a PPM file holds to 16 bits
        return 65535, False
    raise ImageProblemError("unsupported pixel format", "32-bit or signed integers")


def _finished(image: Image.Image, profile: bytes | None, white: int, inverted: bool) -> Decoded:
    if profile is None:
        profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip instead of scale
        image = _eight_bits(image, white, inverted)
    alpha = None
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
    colours, outcome = to_srgb(image, profile)
    colours = colours.convert("RGB")
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    return Decoded(colours, outcome)


def _eight_bits(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    values = np.asarray(image).astype(np.float64).clip(0, white)
    levels = Image.fromarray(np.rint((white - values if inverted else values) * 255 / white).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        levels.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return levels


def _first_line(error: BaseException) -> str:
    """A decoder's message, without the address of its buffer."""
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return re.sub(r"<[^>]* at 0x[0-9a-fA-F]+>", "the file", first)
