"""From an image file's bytes to 8-bit RGB pixels, with one defined outcome for everything found in the wild.

| image                                        | outcome                                              |
|----------------------------------------------|------------------------------------------------------|
| RGB, grey, 1-bit, palette, YCbCr, Lab, HSV   | converted to RGB                                     |
| CMYK                                         | converted to RGB by formula; ICC profiles are unused |
| alpha (RGBA, grey + alpha, palette + alpha)  | composited on white                                  |
| 16-bit grey                                  | scaled to 8 bits (v / 257, rounded)                  |
| 16-bit RGB                                   | the high byte of each value (Pillow's decoder)       |
| EXIF-rotated                                 | turned upright; an unreadable EXIF block is ignored  |
| animated                                     | the first frame                                      |
| floating-point pixels                        | skipped: "unsupported pixel format"                  |
| zero bytes                                   | skipped: "zero-byte image"                           |
| not an image, or damaged                     | skipped: "unreadable image"                          |
| cut off                                      | skipped: "truncated image"                           |
| more than `MAX_PIXELS` pixels                | skipped: "decompression bomb", before it is decoded  |

No warning escapes and no setting of Pillow is changed.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000


class ImageProblemError(Exception):
    """An image that cannot be used; `reason` is the table's, `detail` says what the decoder said."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in mode RGB, upright.

    Raises:
        ImageProblemError: see the module's table.
    """
    if not data:
        raise ImageProblemError("zero-byte image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise ImageProblemError("decompression bomb", str(error)) from None
        except Exception as error:  # decoders of damaged files raise almost anything
            raise ImageProblemError("unreadable image", _first_line(error)) from None
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageProblemError("decompression bomb", f"{width}×{height} pixels, limit {max_pixels}")
            try:
                image.load()
                return _to_rgb(_upright(image))
            except ImageProblemError:
                raise
            except Exception as error:
                text = _first_line(error)
                cut_off = any(word in text.lower() for word in ("truncated", "unexpected end", "eof"))
                reason = "truncated image" if cut_off or isinstance(error, EOFError) else "unreadable image"
                raise ImageProblemError(reason, text) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing reliable about orientation; the pixels are fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageProblemError("unsupported pixel format", "floating-point pixels")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, colours)
    return image.convert("RGB")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
