"""Files in twin folders: whatever has a caption or a twin is a row, whichever suffix it has."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import features

from mapo_fast.data.images.decode import ImageProblemError, decode_image
from mapo_fast.data.sources.base import PairRecord, SkippedRow
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import encoded, picture, png
from tests.data.sources.reading import good, read, reasons

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)


def files(folder: Path, names: dict[str, bytes | str]) -> Path:
    for name, content in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def outcomes(source: Path) -> dict[str, str]:
    """Each row's reason, or the error of decoding its chosen image; empty for a good row."""
    pairs = open_source(source)
    found: dict[str, Any] = {}
    for row in pairs.read(range(len(pairs))):
        if isinstance(row, SkippedRow):
            assert row.detail
            found[row.name] = row.reason
            continue
        found[row.name] = ""
        try:
            decode_image(row.chosen())  # type: ignore[misc]
        except ImageProblemError as problem:
            found[row.name] = str(problem)
    return found


def test_every_pair_on_the_disk_is_a_row(tmp_path: Path) -> None:
    names: dict[str, bytes | str] = {}
    for side, seed in (("chosen", 0), ("rejected", 1)):
        names |= {
            f"{side}/phone.heic": HEIC,
            f"{side}/new.jxl": b"\xff\x0a" + bytes(50),
            f"{side}/PHONE.HEIC": HEIC,
            f"{side}/loud.PNG": png(seed),
            f"{side}/plain": png(seed),
            f"{side}/twin.xyz": png(seed),
            f"{side}/meta.json": "{}",
            f"{side}/Thumbs.db": "x",
        }
        if features.check("jpg_2000"):
            names[f"{side}/old.jp2"] = encoded(picture(seed), "JPEG2000")
    names |= {f"chosen/{name}.txt": "a thing" for name in ("phone", "new", "PHONE", "plain", "twin", "old")}
    names |= {"chosen/loud.TXT": "a thing"}
    names |= {"chosen/single.abc": "x", "chosen/captioned.abc": "x", "rejected/captioned.txt": "a thing"}
    found = outcomes(files(tmp_path, names))
    for name in ("phone", "PHONE"):
        assert found.pop(f"chosen/{name}") == "unsupported format: HEIC: convert it to PNG or JPEG"
    assert found.pop("chosen/new") == "unsupported format: JPEG XL: convert it to PNG or JPEG"
    assert found.pop("chosen/captioned") == "missing counterpart"
    if not features.check("jpg_2000"):
        found["chosen/old"] = ""
    assert found == dict.fromkeys(["chosen/loud", "chosen/old", "chosen/plain", "chosen/twin"], "")


def test_what_tools_put_next_to_images_is_none(tmp_path: Path) -> None:
    source = files(tmp_path, {"chosen/a.png": png(0), "rejected/a.png": png(1), "chosen/a.txt": "a thing"})
    files(
        source,
        {f"{side}/a.{s}": "x" for side in ("chosen", "rejected") for s in ("json", "npz", "bin", "xmp")},
    )
    assert outcomes(source) == {"chosen/a": ""}


@pytest.mark.parametrize("other", ["a.jpg", "a.PNG", "a.heic", "a.jxl"])
def test_two_images_of_one_name_are_named(tmp_path: Path, other: str) -> None:
    source = files(tmp_path, {"chosen/a.png": png(0), "rejected/a.png": png(1), "chosen/a.txt": "a thing"})
    (source / "rejected" / other).write_bytes(png(2))
    (row,) = open_source(source).read([0])
    assert isinstance(row, SkippedRow)
    assert row.reason == "ambiguous name"
    assert "a.png" in row.detail
    assert other in row.detail


def test_two_captions_of_one_name_are_named(tmp_path: Path) -> None:
    source = files(tmp_path, {"chosen/a.png": png(0), "rejected/a.png": png(1)})
    files(source, {"chosen/a.txt": "a thing", "chosen/a.TXT": "another thing"})
    if len(list((source / "chosen").iterdir())) == 3:  # a disk that tells capitals apart
        assert outcomes(source) == {"chosen/a": "ambiguous name"}


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a café".encode("utf-16"), ""),
        ("a café".encode("utf-8-sig"), ""),
        ("a café".encode("latin-1"), "unreadable caption"),
        (b"", "empty caption"),
        (b"\xef\xbb\xbf", "empty caption"),
        (b"x" * (1 << 21), "unreadable caption"),
    ],
)
def test_captions_of_every_encoding(tmp_path: Path, caption: bytes, reason: str) -> None:
    source = files(tmp_path, {"chosen/a.png": png(0), "rejected/a.png": png(1), "chosen/a.txt": caption})
    assert outcomes(source) == {"chosen/a": reason}
    (row,) = open_source(source).read([0])
    assert isinstance(row, SkippedRow) or row.prompt == "a café"


def test_captions_with_kohya_s_suffix(tmp_path: Path) -> None:
    names: dict[str, bytes | str] = {f"{side}/{n}.png": png(i) for i, side in enumerate("wl") for n in "abcd"}
    names |= {"w/a.caption": "one", "l/b.CAPTION": "two", "w/c.caption": "no", "w/c.txt": "three"}
    source = open_source(files(tmp_path, names))
    assert [row.prompt if isinstance(row, PairRecord) else row.reason for row in source.read(range(4))] == [
        "one",
        "two",
        "three",
        "missing caption",
    ]
    assert {path.name for path in source.files()} >= {"a.caption", "b.CAPTION", "c.txt"}
    assert source.note == "w/ and l/ as kohya's DPO data have them: w/ is chosen, l/ is rejected"


def test_images_without_a_caption_have_the_default_one(tmp_path: Path) -> None:
    names: dict[str, bytes | str] = {
        f"{side}/{n}.png": png(i) for i, side in enumerate(("chosen", "rejected")) for n in "abcd"
    }
    names |= {"chosen/a.txt": "own", "chosen/b.txt": " ", "chosen/d.txt": b"\xff"}
    source = open_source(files(tmp_path, names), default_caption="a thing")
    assert [row.prompt if isinstance(row, PairRecord) else row.reason for row in source.read(range(4))] == [
        "own",
        "a thing",
        "a thing",
        "unreadable caption",
    ]
    identities = {open_source(tmp_path, default_caption=text).identity() for text in (None, "a", "a thing")}
    assert len(identities) == 3
    assert source.identity() in identities


def test_details_name_the_files_that_were_looked_for(tmp_path: Path) -> None:
    source = files(tmp_path, {"chosen/a.png": png(0), "rejected/a.jpg": png(1), "rejected/b.png": png(1)})
    first, second = open_source(source).read([0, 1])
    assert isinstance(first, SkippedRow)
    assert isinstance(second, SkippedRow)
    assert first.detail == "no a.txt or a.caption next to chosen/a.png or rejected/a.jpg"
    assert second.detail == "no image b.* in chosen/"


@pytest.mark.parametrize("names", [("chosen", "rejected"), ("w", "l")])
def test_twin_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    for side, folder in enumerate(names):
        for i, stem in enumerate(("a", "sub/b", "c", "d", "e", "g")):
            path = tmp_path / folder / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(2 * i + side))
    first, second = (tmp_path / name for name in names)
    (first / "a.txt").write_text("thing a\n", encoding="utf-8")
    (second / "sub" / "b.txt").write_text("thing b", encoding="utf-8")
    (first / "c.txt").write_text("  ", encoding="utf-8")
    (first / "e.txt").write_text("thing e", encoding="utf-8")
    (second / "e.png").unlink()
    (second / "f.webp").write_bytes(png(1))
    (first / "g.jpg").write_bytes(png(1))
    (first / "Thumbs.db").write_bytes(b"x")
    (first / ".hidden.png").write_bytes(b"x")
    rows = {row.name: row for row in read(tmp_path)}
    assert good(rows[f"{names[0]}/a"]) == ("thing a", png(0), png(1))
    assert good(rows[f"{names[0]}/sub/b"]) == ("thing b", png(2), png(3))
    assert {name.rpartition("/")[2]: r.reason for name, r in rows.items() if isinstance(r, SkippedRow)} == {
        "c": "empty caption",
        "d": "missing caption",
        "e": "missing counterpart",
        "f": "missing counterpart",
        "g": "ambiguous name",
    }


def test_twin_folders_with_different_suffixes(tmp_path: Path) -> None:
    for name, suffix in (("chosen", "png"), ("rejected", "JPG")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"a.{suffix}").write_bytes(png(0))
    (tmp_path / "chosen" / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert reasons(tmp_path) == ["unreadable caption"]
    (tmp_path / "chosen" / "a.txt").write_bytes(b"\xef\xbb\xbfcat")
    assert good(read(tmp_path)[0])[0] == "cat"


def test_subfolder_without_permission_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side / "deep").mkdir(parents=True)
        (tmp_path / side / "1.png").write_bytes(png(1))
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"^data\.source .* cannot be read: Permission denied .*deep"):
        open_source(tmp_path)
