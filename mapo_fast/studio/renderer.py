"""The process that decodes pictures: `python -m mapo_fast.studio.renderer`; see `render`.

A task is a line of JSON on standard input: `path`, `width`, `format`. The answer is a signed number of eight
bytes and as many bytes of the picture or, where it is negative, of the reason why there is none.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

from mapo_fast.data.images.header import header
from mapo_fast.util.files import open_regular

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
"""What is written, and its type for browsers."""
_MEMORY = 2 << 30
_CPU_SECONDS = 3600
"""CPU time after which the process ends; another one takes its place."""


def main() -> None:
    """Answer tasks until standard input ends."""
    _limit()
    for line in sys.stdin.buffer:
        task = json.loads(line)
        try:
            data = encoded(Path(task["path"]), task["width"], task["format"])
            size = len(data)
        except Exception as error:
            data = (str(error) or type(error).__name__).encode()[:500]
            size = -len(data)
        sys.stdout.buffer.write(size.to_bytes(8, "big", signed=True) + data)
        sys.stdout.buffer.flush()


def encoded(path: Path, width: int, format: str) -> bytes:
    """The picture's pixels at most `width` wide and high, written anew.

    Raises:
        OSError: it cannot be read or decoded.
        ValueError: it is no picture.
    """
    from PIL import Image, ImageOps

    warnings.simplefilter("ignore")
    kind = header(path).format
    with open_regular(path) as file, Image.open(file, formats=[kind]) as image:
        image.draft("RGB", (width, width))
        upright = ImageOps.exif_transpose(image) if kind != "PNG" else image
        upright.thumbnail((width, width), Image.Resampling.LANCZOS)
        shown = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    if shown.mode == "RGBA":
        white = Image.new("RGBA", shown.size, "white")
        shown = Image.alpha_composite(white, shown).convert("RGB")
    out = io.BytesIO()
    how = {"JPEG": {"quality": 92}, "WEBP": {"quality": 92, "method": 2}}
    shown.save(out, format=format, **how.get(format, {}))
    return out.getvalue()


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: the time limit is left
        return
    for what, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CPU, _CPU_SECONDS)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if __name__ == "__main__":
    main()
