import logging
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from mapo_fast.data.images.decode import ImageProblemError, decode_image
from mapo_fast.data.images.libtiff import captured
from tests.data.pair_sources import encoded, picture, png


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


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    from concurrent.futures import ThreadPoolExecutor

    image = Image.new("P", (64, 64), 0)
    image.putpalette([1, 2, 3])
    data = encoded(image, transparency=b"\x80")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            assert {image.size for image in pool.map(decode_image, [data, encoded(picture(0), "TIFF")] * 100)}
        assert warnings.filters == before
        warnings.warn("of somebody else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["of somebody else"]


# Formats


def test_postscript_in_a_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {called}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    wrapped = struct.pack("<4sII", b"\xc5\xd0\xd3\xc6", 32, len(script)).ljust(32, b"\0") + script
    for data in (script, wrapped):
        with pytest.raises(ImageProblemError, match="unsupported format: PostScript"):
            decode_image(data)
    assert not called.exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(50), "unsupported format: HEIC: convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50), "unsupported format: HEIC"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "unsupported format: a video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "unsupported format: JPEG XL"),
        (b"<?xml version='1.0'?><svg/>", "unsupported format: SVG"),
        (b"\n<!DOCTYPE html><html></html>", "unsupported format: a web page"),
        (b"%PDF-1.7", "unsupported format: PDF"),
        (b"\xd7\xcd\xc6\x9a" + bytes(60), "unsupported format: WMF"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "unsupported format: an OLE file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "unreadable image: a Git LFS pointer"),
        (b"\xff\xd8\xff" + bytes(30), "unreadable image: a JPEG file that is damaged"),
        (b"II*\0" + bytes(30), "unreadable image: a TIFF file that is damaged or of a rare kind"),
        (b"hello", "unreadable image: no image of a known format; its first bytes are 68 65 6c 6c 6f"),
        (b"\0\0\0\xffftyp", "unsupported format"),
    ],
)
def test_what_a_file_is_that_cannot_be_decoded(data: bytes, says: str) -> None:
    for _ in range(2):
        with pytest.raises(ImageProblemError) as problem:
            decode_image(data)
        assert str(problem.value).startswith(says)
        assert "0x" not in str(problem.value)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "AVIF"]
)
def test_formats_that_are_decoded(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    assert decode_image(encoded(Image.new("RGB", (32, 32), (200, 30, 30)), kind)).size == (32, 32)


# PNG with text


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


LARGE = zlib.compress(b"x" * (3 << 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"workflow\0\0" + LARGE),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0damaged"),
        chunk(b"iTXt", b"\0"),
        chunk(b"zTXt", b""),
        chunk(b"tEXt", b"prompt\0" + b"x" * 70_000_000),
        chunk(b"tEXt", b"x" * 100)[:-1] + b"?",
        chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 900_000)) * 80,
    ],
    ids=lambda text: f"{text[4:8].decode()} {text[8:14]!r} {len(text)}",
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_text_costs_no_pixel(text: bytes, place: str) -> None:
    limits = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    image, data = picture(2), encoded(picture(2))
    at = 33 if place == "before" else len(data) - 12
    assert np.array_equal(np.asarray(decode_image(data[:at] + text + data[at:])), np.asarray(image))
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize("key", ["Raw profile type exif", "XML:com.adobe.xmp"])
def test_orientation_in_text_is_kept_next_to_large_text(key: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    hexed = exif.tobytes().hex()
    value = (
        f"\nexif\n{len(exif.tobytes()):8}\n{hexed}\n"
        if key.startswith("Raw")
        else '<x tiff:Orientation="6"/>'
    )
    body = key.encode() + (b"\0" if key.startswith("Raw") else b"\0\0\0\0\0") + value.encode()
    kind = b"tEXt" if key.startswith("Raw") else b"iTXt"
    data = encoded(picture(1, 4, 8))
    data = data[:33] + chunk(b"zTXt", b"workflow\0\0" + LARGE) + chunk(kind, body) + data[33:]
    assert decode_image(data).size == (4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("cut", range(8, 120, 3))
def test_a_png_cut_in_any_chunk_is_a_problem_with_a_reason(cut: int) -> None:
    data = encoded(picture(1), icc_profile=b"x" * 50)
    data = data[:33] + chunk(b"zTXt", b"a\0\0" + LARGE[:20]) + data[33:]
    with pytest.raises(ImageProblemError) as problem:
        decode_image(data[:cut])
    assert problem.value.detail


# More than 8 bits


def tiff(values: np.ndarray, bits: int, *, sample: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """An uncompressed grey TIFF of these integers or floats."""
    height, width = values.shape
    if bits == 12:
        flat = values.ravel().astype(int)
        body = bytes(
            b
            for a, c in zip(flat[::2], flat[1::2], strict=True)
            for b in (a >> 4, a % 16 << 4 | c >> 8, c % 256)
        )
    else:
        kind = "f" if sample == 3 else "i" if sample == 2 else "u"
        body = values.astype(f"{order}{kind}{bits // 8}").tobytes()
    tags = [
        (256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1),
        (278, height), (279, len(body)), (339, sample),
    ]  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for tag, value in tags:
        long = tag in (273, 279)
        head += struct.pack(order + "HHI", tag, 4 if long else 3, 1)
        head += struct.pack(order + ("I" if long else "HH"), *((value,) if long else (value, 0)))
    return head.ljust(200, b"\0") + body


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
LEVELS = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("bits", "photometric", "order"), [(16, 1, "<"), (16, 1, ">"), (12, 1, "<"), (16, 0, "<")]
)
def test_grey_of_more_than_8_bits_keeps_its_range(bits: int, photometric: int, order: str) -> None:
    data = tiff(np.rint(RAMP * (2**bits - 1)), bits, photometric=photometric, order=order)
    expected = LEVELS if photometric else 255 - LEVELS
    assert np.abs(np.asarray(decode_image(data))[:, :, 1].astype(int) - expected).max() <= (bits == 12)


def test_a_16_bit_pgm_keeps_its_range() -> None:
    for most in (65535, 1023):
        body = np.rint(RAMP * most).astype(">u2").tobytes()
        image = decode_image(b"P5 16 16 %d\n" % most + body)
        assert np.abs(np.asarray(image)[:, :, 0].astype(int) - LEVELS).max() <= 1


def test_a_clear_value_of_a_16_bit_png() -> None:
    data = encoded(Image.fromarray(np.array([[0, 257], [25700, 65535]], np.uint16)))
    data = data[:33] + chunk(b"tRNS", struct.pack(">H", 25700)) + data[33:]
    assert np.asarray(decode_image(data))[:, :, 0].tolist() == [[0, 1], [255, 255]]


@pytest.mark.parametrize(
    "data",
    [
        tiff(RAMP * 2**31, 32),
        tiff(RAMP * 2**30, 32, sample=2),
        tiff(RAMP * 2**14, 16, sample=2),
        tiff(RAMP, 32, sample=3),
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF", compression="tiff_lzw"),
        b"Pf 16 16 -1.0\n" + RAMP.astype("<f4").tobytes(),
    ],
)
def test_pixels_without_a_known_range_are_named(data: bytes) -> None:
    with pytest.raises(ImageProblemError, match=r"unsupported pixel format: (32-bit or signed|floating)"):
        decode_image(data)


# libtiff


def test_libtiff_reports_in_the_detail_and_not_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encoded(picture(0, 64, 64), "TIFF", compression="tiff_adobe_deflate"))
    data[200:1200] = b"\xff" * 1000
    details = set()
    for _ in range(2):
        with pytest.raises(ImageProblemError) as problem:
            decode_image(bytes(data))
        details.add(problem.value.detail)
    assert len(details) == 1
    assert "ZIPDecode" in details.pop()
    assert capfd.readouterr().err == ""


def test_pillow_logs_nothing_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # as in the command: pytest has handlers of its own
    data = encoded(picture(0), "TIFF")
    three, many = (struct.pack("<HHLHH", 277, 3, 1, samples, 0) for samples in (3, 36_099))
    assert three in data
    with pytest.raises(ImageProblemError):
        decode_image(data.replace(three, many))
    assert capfd.readouterr().err == ""


def test_what_others_write_while_a_tiff_is_decoded_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with captured(said):
        os.write(2, b"Traceback (most recent call last):\nLZWDecode: Not enough data.\n  50% of it\n")
    assert said == ["LZWDecode: Not enough data."]
    assert capfd.readouterr().err == "Traceback (most recent call last):\n  50% of it\n"
    saved = os.dup(2)
    os.close(2)
    try:
        assert decode_image(encoded(picture(0), "TIFF")).size == (32, 32), "without a standard error"
    finally:
        os.dup2(saved, 2)
        os.close(saved)
