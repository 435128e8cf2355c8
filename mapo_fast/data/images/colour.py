"""Colours as sRGB: what an embedded ICC profile says about an image is applied, not dropped.

The conversion is ImageCms' own (perceptual intent). A profile that moves no colour by more than one of 255
steps is sRGB by another name, and its image stays as it is.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

Profile = Literal["", "converted", "ignored"]
"""Outcome of an image's colour profile: none but sRGB, applied, or unusable."""

_TESTED = 16
"""Levels of each channel at which a profile is compared with sRGB."""


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, Profile]:
    """The image in sRGB, in mode RGB where its profile changed it; alpha is not touched and not kept.

    Args:
        image: of 8 bits per channel.
        profile: bytes of an ICC profile; None without one.
    """
    if profile is None:
        return image, ""
    try:
        mode, transform = _transform(profile)
        source = _in_mode(image, mode)
        converted = None if transform is None else ImageCms.applyTransform(source, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ArithmeticError):
        return image, "ignored"
    return (image, "") if converted is None else (converted, "converted")


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of the images that a profile is for, and the way to sRGB; None where that changes nothing."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip())
    if mode is None:
        raise ValueError("a profile of another kind")
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return mode, transform
    levels = np.linspace(0, 255, _TESTED).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(_TESTED, -1, 3)
    tested = Image.fromarray(colours if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    moved = np.asarray(ImageCms.applyTransform(tested, transform), np.int16)
    same = np.abs(moved - np.asarray(tested.convert("RGB"), np.int16)).max() <= 1
    return mode, None if same else transform


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in the mode of its profile; grey images may have a profile of RGB.

    Raises:
        ValueError: the profile is for images of another kind.
    """
    grey = image.mode in ("1", "L", "LA", "La")
    fits = {"L": grey, "CMYK": image.mode == "CMYK", "RGB": image.mode not in ("CMYK", "LAB")}
    if not fits[mode]:
        raise ValueError(f"a profile for {mode} in an image of mode {image.mode}")
    return image if image.mode == mode else image.convert(mode)
