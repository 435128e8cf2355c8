"""Pictures are written anew by a process with limits; one that cannot be decoded harms no other."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mapo_fast.studio.render import Renderer
from mapo_fast.util.errors import UserError
from tests.studio.pictures import painted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with Renderer() as one:
        yield one


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_keeps_its_pixels_and_loses_its_metadata(
    renderer: Renderer, tmp_path: Path, format: str
) -> None:
    path = painted(tmp_path / "a.png", 7, prompt="secret prompt")
    data = renderer.render(path, 4, format)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (format, (4, 4))
        found = image.convert("RGB").getpixel((2, 2))
    with Image.open(path) as image:
        expected = image.getpixel((4, 4))
    assert all(abs(a - b) < 12 for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]
    assert b"secret" not in data


def test_transparency_is_white_and_rotation_is_undone(renderer: Renderer, tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    with Image.open(io.BytesIO(renderer.render(tmp_path / "a.png", 64, "PNG"))) as image:
        assert image.getpixel((1, 1)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "b.jpg", exif=turned)
    with Image.open(io.BytesIO(renderer.render(tmp_path / "b.jpg", 64, "PNG"))) as image:
        assert image.size == (20, 40)


def test_what_cannot_be_decoded_is_one_sentence_and_the_next_one_is_shown(
    renderer: Renderer, tmp_path: Path
) -> None:
    good = painted(tmp_path / "good.png", 1)
    for name, data in {
        "cut.png": good.read_bytes()[:45],
        "drawing.png": b"<svg/>",
        "script.png": b"%!PS-Adobe",
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} cannot be shown: "):
            renderer.render(tmp_path / name, 64)
    with pytest.raises(UserError, match=r"missing\.png cannot be shown"):
        renderer.render(tmp_path / "missing.png", 64)
    assert renderer.render(good, 64)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_one_that_takes_too_long_or_dies_is_given_up(tmp_path: Path) -> None:
    good = painted(tmp_path / "good.png", 1)
    with Renderer(seconds=0.01) as hurried, pytest.raises(UserError, match="took too long"):
        hurried.render(good, 64)
    with Renderer() as renderer:
        renderer.render(good, 64)
        process = renderer._process
        assert process is not None
        process.kill()
        process.wait()
        assert renderer.render(good, 64)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_its_process_has_limits(renderer: Renderer, tmp_path: Path) -> None:
    renderer.render(painted(tmp_path / "a.png", 1), 64)
    assert renderer._process is not None
    limits = Path(f"/proc/{renderer._process.pid}/limits").read_text().splitlines()
    soft = {line[:25].strip(): line[26:].split()[0] for line in limits}
    assert (soft["Max address space"], soft["Max cpu time"]) == (str(2 << 30), "3600")
    assert soft["Max file size"] == "0"


def test_widths_and_formats_are_limited(renderer: Renderer, tmp_path: Path) -> None:
    for width, format in ((0, "PNG"), (9000, "PNG"), (64, "SVG")):
        with pytest.raises(UserError, match="must be one of"):
            renderer.render(tmp_path / "a.png", width, format)
