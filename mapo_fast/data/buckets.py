"""Aspect buckets: few image shapes of nearly one area, and one of them for each pair.

A bucket is (height, width) in pixels; both are multiples of `step`, the area is at most resolution² (so the
square needs the most memory) and at least 0.8 of the best area that the step allows, the aspect at most 4.

An image is resized, aspect kept, until it just covers the bucket, and the rest is cut off at the centre.
Both images of a pair go to the same bucket: the one for which the image that loses more loses least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mapo_fast.models import sdxl

MAX_ASPECT = 4.0
MIN_AREA = 0.8

Size = tuple[int, int]
"""(height, width) in pixels."""


def make_buckets(resolution: int, step: int) -> list[Size]:
    """All buckets, sorted; mirrored shapes come in pairs. The step is no larger than the resolution."""
    area = resolution**2
    found: set[Size] = set()
    for side in range(step, int(resolution * MAX_ASPECT) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= MAX_ASPECT * min(side, other):
            found |= {(side, other), (other, side)}
    best = max(height * width for height, width in found)
    return sorted((h, w) for h, w in found if h * w >= MIN_AREA * best)


@dataclass(frozen=True)
class BucketChoice:
    """The bucket of a pair and the area share that its worse image loses."""

    bucket: Size
    crop: float


def choose_bucket(chosen: Size, rejected: Size, buckets: list[Size]) -> BucketChoice:
    """The bucket that crops the pair's worse image least; the two images may be swapped.

    Ties go to the bucket that loses less in sum, then to the larger, then to the squarer one.
    """
    height, width = np.array(buckets, dtype=np.float64).T
    lost = np.stack([_lost(size, height, width) for size in (chosen, rejected)]).round(12)
    worst, total, area = lost.max(0), lost.sum(0).round(12), height * width
    best = np.lexsort((height, np.abs(np.log(height / width)).round(12), -area, total, worst))[0]
    return BucketChoice(buckets[int(best)], float(worst[best]))


def _lost(size: Size, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Share of the image's area outside the bucket once it just covers it."""
    scale = np.maximum(height / size[0], width / size[1])
    return np.asarray(1.0 - height * width / (scale**2 * size[0] * size[1]))


@dataclass(frozen=True)
class Crop:
    """How an image is fitted to its bucket: size after the resize, then the crop's corner, all in pixels."""

    resized: Size
    crop_top: int
    crop_left: int
    upscaled: bool


def crop_to(size: Size, bucket: Size) -> Crop:
    """Cover the bucket, cut at the centre."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    height = max(bucket[0], round(size[0] * scale))
    width = max(bucket[1], round(size[1] * scale))
    upscaled = size[0] < bucket[0] or size[1] < bucket[1]
    return Crop((height, width), (height - bucket[0]) // 2, (width - bucket[1]) // 2, upscaled)


def fit_image(image: Image.Image, bucket: Size) -> Image.Image:
    """The image resized (Lanczos) and cropped to the bucket's shape."""
    how = crop_to((image.height, image.width), bucket)
    height, width = how.resized
    if (image.height, image.width) != how.resized:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = how.crop_left, how.crop_top
    return image.crop((left, top, left + bucket[1], top + bucket[0]))


def time_ids(size: Size, bucket: Size, conditioning: str) -> tuple[float, ...]:
    """The UNet's inputs for one image's size, see `sdxl.time_ids`.

    `shared` is what sampling uses, the same for both images of a pair: original size = target size, no crop.
    `own` is the image's file size and its own crop (a mirrored image keeps its mirror image's).
    """
    if conditioning == "shared":
        return sdxl.time_ids(bucket, (0, 0), bucket)
    how = crop_to(size, bucket)
    return sdxl.time_ids(size, (how.crop_top, how.crop_left), bucket)
