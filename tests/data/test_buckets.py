import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mapo_fast.data.buckets import choose_bucket, crop_to, fit_image, make_buckets, time_ids


@pytest.mark.parametrize(
    ("resolution", "step"), [(1024, 64), (768, 64), (512, 8), (64, 64), (32, 8), (32, 32), (48, 32), (40, 32)]
)
def test_bucket_list(resolution: int, step: int) -> None:
    buckets = make_buckets(resolution, step)
    best = max(h * w for h, w in buckets)
    assert buckets
    for height, width in buckets:
        assert height % step == 0
        assert width % step == 0
        assert 0.8 * best <= height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)
        assert (width, height) in buckets
    if resolution % step == 0:
        assert (resolution, resolution) in buckets


def test_sdxl_buckets() -> None:
    assert {(1024, 1024), (832, 1216), (768, 1344), (1536, 640)} <= set(make_buckets(1024, 64))


def crop(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    aspect, target = size[0] / size[1], bucket[0] / bucket[1]
    return 1 - min(aspect, target) / max(aspect, target)


sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes)
def test_the_bucket_crops_the_worse_image_least(chosen: tuple[int, int], rejected: tuple[int, int]) -> None:
    buckets = make_buckets(1024, 64)
    best = choose_bucket(chosen, rejected, buckets)
    worse = [max(crop(chosen, bucket), crop(rejected, bucket)) for bucket in buckets]
    assert best.crop == pytest.approx(min(worse), abs=1e-9)
    assert best == choose_bucket(rejected, chosen, buckets)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_fit_covers_the_bucket(size: tuple[int, int]) -> None:
    bucket = (832, 1216)
    how = crop_to(size, bucket)
    assert how.resized[0] == bucket[0] or how.resized[1] == bucket[1]
    for side in (0, 1):
        offset = (how.crop_top, how.crop_left)[side]
        assert how.resized[side] >= bucket[side]
        assert abs(how.resized[side] - bucket[side] - 2 * offset) <= 1
    assert how.upscaled == (how.resized[0] > size[0] or how.resized[1] > size[1])


def test_fit_image_cuts_the_centre() -> None:
    values = np.zeros((8, 24, 3), np.uint8)
    values[:, 8:16] = 200
    image = fit_image(Image.fromarray(values), (8, 8))
    assert np.asarray(image).shape == (8, 8, 3)
    assert (np.asarray(image) == 200).all()


def test_fit_image_resizes_before_it_cuts() -> None:
    image = fit_image(Image.new("RGB", (64, 128), (10, 20, 30)), (32, 32))
    assert image.size == (32, 32)
    assert image.getpixel((5, 5)) == (10, 20, 30)


def test_time_ids() -> None:
    size, bucket = (600, 1000), (832, 1216)
    how = crop_to(size, bucket)
    own = time_ids(size, bucket, "own")
    assert own == (600, 1000, how.crop_top, how.crop_left, 832, 1216)
    assert how.crop_left > 0
    shared = time_ids(size, bucket, "shared")
    assert shared == (832, 1216, 0, 0, 832, 1216)
    assert shared == time_ids((50, 60), bucket, "shared")
