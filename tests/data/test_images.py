import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from mapo_fast.data.images import ImageProblemError, decode_image
from tests.data.sources import encoded, picture, png


def colour(data: bytes) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0])


def test_rgb_is_unchanged() -> None:
    original = picture(3, 20, 30)
    assert np.array_equal(np.asarray(decode_image(encoded(original))), np.asarray(original))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (4, 4), (0, 200, 0)).quantize(4), "PNG", (0, 200, 0)),
        (Image.new("I;16", (4, 4), 257 * 100), "PNG", (100, 100, 100)),
        (Image.new("I;16", (4, 4), 257 * 100 + 200), "PNG", (101, 101, 101)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 255)), "PNG", (200, 0, 0)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, kind: str, expected: tuple[int, ...]) -> None:
    assert colour(encoded(image, kind)) == expected


def test_half_transparent_is_composited_on_white() -> None:
    red = colour(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128))))
    assert red[0] == 255
    assert red[1] == red[2] == pytest.approx(127, abs=1)


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((3, 3), 1)
    data = encoded(image, transparency=0)
    assert colour(data) == (255, 255, 255)
    assert tuple(np.asarray(decode_image(data))[3, 3]) == (40, 50, 60)


def test_cmyk_jpeg() -> None:
    red, green, blue = colour(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert red > 250
    assert max(green, blue) < 5


def test_sixteen_bit_rgb_keeps_the_high_byte() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFF00) * 2 for _ in range(2))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert colour(data) == (0x12, 0x80, 0xFF)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is its right side: turn by 90° clockwise
    upright = decode_image(encoded(image, exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == (255, 0, 0)


def test_broken_exif_is_ignored() -> None:
    data = encoded(picture(1), exif=b"Exif\0\0nonsense, not a TIFF header")
    assert decode_image(data).size == (32, 32)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ((250, 0, 0), (0, 250, 0))]
    assert colour(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (250, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_truncated(kind: str) -> None:
    data = encoded(picture(1, 64, 64), kind)
    with pytest.raises(ImageProblemError) as problem:
        decode_image(data[: len(data) // 2])
    assert problem.value.reason == "truncated image"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero-byte image"),
        (b"hello", "unreadable image"),
        (png(0)[:20], "unreadable image"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "unsupported pixel format"),
    ],
)
def test_unusable(data: bytes, reason: str) -> None:
    with pytest.raises(ImageProblemError) as problem:
        decode_image(data)
    assert problem.value.reason == reason


def test_damaged_data_is_unreadable() -> None:
    data = bytearray(png(0, 64, 64))
    data[60:64] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageProblemError) as problem:
        decode_image(bytes(data))
    assert problem.value.reason in ("unreadable image", "truncated image")


@pytest.mark.parametrize("side", [11_000, 14_000, 60_000])  # quiet, warned about and refused by Pillow
def test_decompression_bomb(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = struct.pack(">I", 13) + b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageProblemError) as problem:
        decode_image(data)
    assert problem.value.reason == "decompression bomb"


def test_no_warning_escapes_and_no_global_state_changes() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(png(1, 40, 40), max_pixels=1600)
        with pytest.raises(ImageProblemError):
            decode_image(png(1, 40, 40), max_pixels=1599)
        image = Image.new("P", (4, 4), 0)
        image.putpalette([1, 2, 3])
        decode_image(encoded(image, transparency=b"\x80"))
    assert not caught
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
