"""What is left out is listed: in every row a reason and a detail, the same bytes in every run."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from mapo_fast.data.choose import image_key
from mapo_fast.data.prepare import prepare
from mapo_fast.data.scan import content_hash, scan
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import UserError
from tests.data.images.test_colour import profile
from tests.data.pair_sources import (
    config,
    contents,
    encoded,
    jsonl_folder,
    pickapic_rows,
    picture,
    png,
    write_jsonl,
    write_parquet,
)
from tests.data.sources.test_listing import snapshot

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


def test_converted_profiles_are_counted_and_a_leak_is_said(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    for i in range(6):
        (source / f"{i}w.png").write_bytes(encoded(picture(2 * i), icc_profile=profile("wide")))
    (source / "0l.png").write_bytes(encoded(picture(1), icc_profile=b"nonsense"))
    (source / "1l.png").write_bytes(encoded(picture(3), icc_profile=profile("srgb")))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert (summary.converted, summary.ignored_profiles) == (6, 1)
    assert [text for text in summary.warnings if "100% of the chosen and 0% of the rejected images" in text]


def test_latents_of_an_earlier_version_are_not_taken_for_converted_ones(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    source = jsonl_folder(tmp_path / "s", 3)
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    (source / "0w.png").write_bytes(data := encoded(picture(0), icc_profile=profile("wide")))
    assert image_key(content_hash(data), (32, 32), "converted") != image_key(content_hash(data), (32, 32))
    assert prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)).converted == 1


def test_models_and_data_in_the_cache_of_the_hub(tmp_path: Path, tiny_sdxl: Path) -> None:
    try:
        (tmp_path / "probe").symlink_to(tmp_path)
    except OSError:
        pytest.skip("this system does not allow symbolic links")
    model = shutil.copytree(tiny_sdxl, tmp_path / "hub" / "model" / "snapshots" / "1")
    plain = prepare(config(tiny_sdxl, jsonl_folder(tmp_path / "s", 3), tmp_path / "a", held_out=0.0))
    source = snapshot(jsonl_folder(tmp_path / "hub" / "data" / "snapshots", 3))
    linked = prepare(config(snapshot(model), source, tmp_path / "b", held_out=0.0))
    assert (linked.pairs, linked.images) == (plain.pairs, plain.images) == (3, 6)
    first, second = (contents(tmp_path / name / "shards") for name in "ab")
    assert first == second
