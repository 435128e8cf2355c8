"""Colour profiles: pixels are sRGB after decoding, whatever an image was stored in."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from mapo_fast.data.images.colour import to_srgb
from mapo_fast.data.images.decode import decode
from mapo_fast.data.leak import profile_leaks
from tests.data.pair_sources import encoded, picture


@cache
def profile(kind: str) -> bytes:
    """An ICC profile of matrix and gamma, or of a grey gamma."""
    if kind == "srgb":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gamma = struct.pack(">4sIIH", b"curv", 0, 1, int(1.8 * 256)) + b"\0\0"
    white = xyz(0.9642, 1.0, 0.8249)
    if kind == "grey":
        return icc(b"GRAY", {b"wtpt": white, b"kTRC": gamma})
    # Adobe's primaries, adapted to D50
    red, green, blue = (
        xyz(0.60974, 0.31111, 0.01947),
        xyz(0.20528, 0.62567, 0.06087),
        xyz(0.14919, 0.06322, 0.74457),
    )
    tags = {b"wtpt": white, b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}
    return icc(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma))


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"cprt": b"text\0\0\0\0none\0\0\0\0", **tags}
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data
    size = at + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s4sI", 2026, 1, 1, 0, 0, 0, b"acsp", b"\0\0\0\0", 0)
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def by_lcms(image: Image.Image, kind: str) -> np.ndarray:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile(kind)))
    out = ImageCms.profileToProfile(image, opened, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert out is not None
    return np.asarray(out).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_an_embedded_profile_is_converted_to_srgb(kind: str) -> None:
    image = Image.new("RGB", (8, 8), (101, 169, 96))
    options: dict[str, Any] = {"quality": 100} | ({"lossless": True} if kind == "WEBP" else {})
    stored = encoded(image, kind, icc_profile=profile("wide"), **({} if kind in ("PNG", "TIFF") else options))
    got, outcome = decode(stored)
    assert outcome == "converted"
    assert np.abs(np.asarray(got).astype(int) - by_lcms(image, "wide")).max() <= (3 if kind == "JPEG" else 0)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() > 20, "the profile says something"


def test_a_picture_stored_in_another_space_comes_back() -> None:
    wide = ImageCms.ImageCmsProfile(io.BytesIO(profile("wide")))
    original = Image.linear_gradient("L").resize((32, 32))
    original = Image.merge("RGB", (original, original.rotate(90), original.rotate(180)))
    stored = ImageCms.profileToProfile(original, ImageCms.createProfile("sRGB"), wide)
    assert stored is not None
    got = decode(encoded(stored, icc_profile=profile("wide"))).image
    assert np.abs(np.asarray(got).astype(int) - np.asarray(original)).mean() < 1


def test_srgb_by_name_changes_no_pixel() -> None:
    image = picture(1)
    got, outcome = decode(encoded(image, icc_profile=profile("srgb")))
    assert outcome == ""
    assert np.array_equal(np.asarray(got), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grey_profiles(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    else:
        image = Image.new(mode, (4, 4), {"LA": (100, 255), "1": 1}.get(mode, 100))
    got, outcome = decode(encoded(image, icc_profile=profile("grey")))
    assert outcome == "converted"
    grey = Image.new("L", (4, 4), 255 if mode == "1" else 100)
    assert np.array_equal(np.asarray(got), by_lcms(grey, "grey"))


def test_colours_are_converted_before_they_are_laid_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (101, 169, 96, 0))
    image.putpixel((0, 0), (101, 169, 96, 255))
    for stored in (image, image.quantize(4)):
        got, outcome = decode(encoded(stored, icc_profile=profile("wide")))
        assert outcome == "converted"
        assert got.getpixel((1, 1)) == (255, 255, 255)
        assert np.abs(np.array(got.getpixel((0, 0))) - by_lcms(image.convert("RGB"), "wide")[0, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("broken", [b"nonsense", b"", b"\0" * 200, "cut", "grey", "unknown"])
def test_a_broken_or_unfitting_profile_is_ignored_and_said(kind: str, broken: Any) -> None:
    data = {"cut": profile("wide")[:150], "grey": profile("grey"), "unknown": icc(b"LUV ", {})}.get(
        broken, broken
    )
    image = picture(1)
    got, outcome = decode(
        encoded(image, kind, icc_profile=data, **({"quality": 100} if kind == "JPEG" else {}))
    )
    if data:
        assert outcome == "ignored"
    if kind != "JPEG":
        assert np.array_equal(np.asarray(got), np.asarray(image))


@pytest.mark.parametrize("body", [b"x\0\0garbage", b"x", b"x\0\0" + zlib.compress(bytes(1 << 25)), b""])
def test_a_damaged_profile_in_a_png_costs_no_pixel(body: bytes) -> None:
    image, data = picture(1), encoded(picture(1))
    chunk = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    got, outcome = decode(data[:33] + chunk + data[33:])
    assert outcome == "ignored"
    assert np.array_equal(np.asarray(got), np.asarray(image))


def test_a_profile_of_more_than_a_mebibyte_in_a_png_is_used() -> None:
    large = profile("wide") + bytes(1 << 21)
    large = struct.pack(">I", len(large)) + large[4:]
    assert decode(encoded(picture(1), icc_profile=large)).profile == "converted"


def test_cmyk_takes_only_profiles_of_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    got, outcome = to_srgb(image, profile("wide"))
    assert (got, outcome) == (image, "ignored")


def test_profiles_that_predict_the_label() -> None:
    assert profile_leaks(["", ""], ["", ""]) == []
    assert profile_leaks(["converted"] * 5, ["converted"] * 5) == []
    (warning,) = profile_leaks(["converted"] * 5, [""] * 5)
    assert warning.startswith("100% of the chosen and 0% of the rejected images have a colour profile")
    (warning,) = profile_leaks(["", "ignored"] * 5, [""] * 10)
    assert "unusable" in warning
