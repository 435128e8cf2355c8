"""Mistakes in how data lie on the disk: each gets one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_fast.data.prepare import prepare
from mapo_fast.data.sources.registry import open_source
from mapo_fast.data.sources.unknown import PAIRS, SINGLE
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import config, png
from tests.data.preparing import said

LINES = {
    "nothing": ((), "data.source S is an empty folder: " + PAIRS),
    "one of the folders": (
        ("chosen/a.png",),
        f"data.source S has chosen/ and no rejected/: {PAIRS}; {SINGLE}",
    ),
    "one of kohya's folders": (("l/a.png",), f"data.source S has l/ and no w/: {PAIRS}; {SINGLE}"),
    "images alone": (
        ("a.png", "b.JPG", "a.txt"),
        f"data.source S has images and nothing that says which of two is preferred: {PAIRS}; {SINGLE}",
    ),
    "images in a folder": (
        ("10_cats/a.png",),
        f"data.source S has images and nothing that says which of two is preferred: {PAIRS}; {SINGLE}",
    ),
    "images and a table": (
        ("a.png", "b.png", "scores.csv"),
        "data.source S has images and nothing that says which of two is preferred, and scores.csv is not "
        f"read: {PAIRS}; {SINGLE}",
    ),
    "a folder too high": (
        ("data/chosen/a.png", "data/rejected/a.png"),
        "data.source S has the data in a folder of its own: name S/data",
    ),
    "other names": (
        ("good/a.png", "bad/a.png"),
        "data.source S has the folders bad/ and good/, and nothing says which one people prefer: rename that "
        "one to chosen/ and the other one to rejected/",
    ),
    "an archive": (
        ("pairs.zip",),
        "data.source S has pairs.zip in it, which is an archive: unpack it, and name the folder",
    ),
    "a table": (
        ("pairs.csv",),
        "data.source S has pairs.csv in it, which is a table that is not read: write its rows into a file "
        f"named pairs.jsonl; {PAIRS}",
    ),
    "other names in both": (
        ("chosen/a.png", "chosen/b.png", "rejected/c.jpg", "rejected/d.jpg"),
        "data.source S: chosen/ and rejected/ have no file name in common (chosen/a.png, rejected/c.jpg), "
        'and the two images of a pair have equal names: rename them, or set data.pair_by to "order" '
        '(numbered files, the first with the first) or "prompt" (by the prompts that A1111 and ComfyUI write '
        "into images)",
    ),
    "folders without images": (
        ("chosen/a.txt", "rejected/a.txt"),
        "data.source S: chosen/ and rejected/ hold no images",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_mistake_gets_its_line(tmp_path: Path, case: str) -> None:
    names, line = LINES[case]
    source = tmp_path / "s"
    source.mkdir()
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"not read")
    with pytest.raises(UserError) as caught:
        open_source(source)
    assert str(caught.value) == line.replace("S", str(source), 1).replace("name S/", f"name {source}/")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pairs.ZIP", "is an archive: unpack it, and name the folder"),
        ("pairs.tar.gz", "is an archive: unpack it, and name the folder"),
        ("pairs.csv", f"is a table that is not read: write its rows into a file named pairs.jsonl; {PAIRS}"),
        ("a.webp", f"is one image: name the folder of the pairs; {PAIRS}"),
    ],
)
def test_a_file_that_is_no_source(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_bytes(b"not read")
    with pytest.raises(UserError) as caught:
        open_source(tmp_path / name)
    assert str(caught.value) == f"data.source {tmp_path / name} {line}"


def test_too_much_crop_and_missing_captions_name_their_remedies(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = tmp_path / "s"
    for side, seed in (("chosen", 0), ("rejected", 50)):
        (source / side).mkdir(parents=True)
        for number in range(3):
            (source / side / f"{number}.png").write_bytes(png(seed + number))
        (source / side / "wide.png").write_bytes(png(seed + 9, 16, 64) if seed else png(9, 64, 16))
    for name in ("0", "1", "wide"):
        (source / "chosen" / f"{name}.txt").write_text(name, encoding="utf-8")
    crop = (
        "too much crop: crop the two images of a pair to one shape, raise data.max_crop, or choose another "
        "data.resolution or data.bucket_step"
    )
    caption = "missing caption: write captions next to the images, or set data.default_caption"
    with pytest.raises(UserError) as caught:
        prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.2))
    assert str(caught.value).endswith(f"fix the data or raise data.max_skipped; {caption}; {crop}")
    _, told = said(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.5, held_out=0.0))
    told = " ".join(told.split())
    for wanted in (caption, crop):
        reason, _, way_out = wanted.partition(": ")
        _, found, rest = told.partition(f"skipped: 1 × {reason} (such as ")
        assert found
        assert way_out in rest
