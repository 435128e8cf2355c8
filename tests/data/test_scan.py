"""Scanned parts are kept; what is left out is listed, in every row with a reason and a detail."""

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from mapo_fast.data import scan as scan_module
from mapo_fast.data.prepare import prepare
from mapo_fast.data.scan import scan
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    contents,
    encoded,
    jsonl_folder,
    pickapic_rows,
    png,
    write_jsonl,
    write_parquet,
)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped byte", "not parquet"])
def test_damaged_scan_part_is_scanned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(scan_module, "PART_ROWS", 3)
    source = open_source(jsonl_folder(tmp_path / "s", 6))
    folder = tmp_path / "scan"
    folder.mkdir()
    rows = scan(source, source.identity(), folder, lambda done: None)
    whole = contents(folder)
    part = sorted(folder.iterdir())[1]
    data = part.read_bytes()
    at = data.index(b"a red thing")
    damaged = {
        "cut": data[:-20],
        "empty": b"",
        "flipped byte": data[: at + 3] + b"R" + data[at + 4 :],
        "not parquet": b"x" * 500,
    }
    part.write_bytes(damaged[damage])
    assert scan(source, source.identity(), folder, lambda done: None) == rows
    assert contents(folder) == whole


BAD = {
    "unreadable image": b"garbage",
    "zero-byte image": b"",
    "truncated image": png(1, 64, 64)[:5000],
    "unsupported format": b"%!PS-Adobe-3.0",
    "unsupported pixel format": encoded(Image.new("F", (32, 32)), "TIFF"),
    "decompression bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    + (header := struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    + struct.pack(">I", zlib.crc32(b"IHDR" + header)),
}


def scanned(source: Path, folder: Path) -> dict[str, bytes]:
    pairs = open_source(source)
    folder.mkdir()
    rows = scan(pairs, pairs.identity(), folder, lambda done: None)
    assert all(row.detail.strip(": ") for row in rows if row.reason), rows
    assert "0x" not in "".join(row.detail for row in rows)
    return contents(folder)


def test_a_full_terminal_is_not_taken_for_the_source(tmp_path: Path) -> None:
    source = open_source(jsonl_folder(tmp_path / "s", 2))

    def progress(done: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "scan").mkdir()
    with pytest.raises(OSError, match="No space left") as error:
        scan(source, source.identity(), tmp_path / "scan", progress)
    assert not isinstance(error.value, UserError)
    assert "data.source" not in str(error.value)


def test_every_skipped_row_has_a_detail_and_two_runs_agree(tmp_path: Path) -> None:
    ok = pickapic_rows(1)[0]
    table = [ok | {"jpg_0": data} for data in BAD.values()]
    table += [ok | changed for changed in (
        {"jpg_0": None}, {"label_0": 0.5, "label_1": 0.5}, {"label_0": None}, {"label_0": 7.0},
        {"has_label": False}, {"caption": None}, {"caption": " "}, {"jpg_0": ok["jpg_1"]},
    )]  # fmt: skip
    twins = {"0.png": png(0), "0.txt": b"", "1.png": png(0), "1.txt": b"a", "2.png": png(2), "3.txt": b"a"}
    twins |= {f"{i}.{suffix}": content for i, data in enumerate(BAD.values(), 10) for suffix, content in
              (("png", data), ("txt", b"a thing"))}  # fmt: skip
    for name, data in twins.items():
        for side in ("chosen", "rejected"):
            (tmp_path / "twins" / side).mkdir(parents=True, exist_ok=True)
            (tmp_path / "twins" / side / name).write_bytes(data)
    (tmp_path / "twins" / "chosen" / "4.png").write_bytes(png(0))
    lines = jsonl_folder(tmp_path / "lines", 2)
    write_jsonl(lines, [{"prompt": "a"}, "5", "{", {"prompt": "", "chosen": "0w.png", "rejected": "0l.png"},
                        {"prompt": "a", "chosen": "no.png", "rejected": "../x"}])  # fmt: skip
    write_parquet(tmp_path / "table" / "a.parquet", table)
    for name in ("table", "twins", "lines"):
        first, second = (scanned(tmp_path / name, tmp_path / f"{name}{i}") for i in range(2))
        assert first == second


@pytest.mark.slow
def test_what_was_looked_for_is_named(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    (source / "0w.png").write_bytes(b"garbage")
    (source / "1l.png").unlink()
    (source / "2w.png").unlink()
    (source / "2w.png").mkdir()
    runs = []
    for name in ("a", "b"):
        prepare(config(tiny_sdxl, source, tmp_path / name, max_skipped=1.0))
        runs.append((tmp_path / name / "skipped.jsonl").read_bytes())
    assert runs[0] == runs[1]
    rows = [json.loads(line) for line in runs[0].splitlines()]
    assert [row["detail"] for row in rows] == [
        "chosen: 0w.png: no image of a known format; its first bytes are 67 61 72 62 61 67 65",
        "rejected = '1l.png': No such file or directory",
        "chosen = '2w.png': it is a folder, not a regular file",
    ]
