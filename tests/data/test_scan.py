"""Scanned parts are kept."""

from pathlib import Path

import pytest

from mapo_fast.data import scan
from mapo_fast.data.prepare import prepare
from tests.data.pair_sources import (
    config,
    contents,
    jsonl_folder,
)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped byte", "not parquet"])
def test_damaged_scan_part_is_scanned_again(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(scan, "PART_ROWS", 3)
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    prepare(run)
    whole = contents(tmp_path / "c")
    part = sorted((tmp_path / "c" / "scan").iterdir())[1]
    data = part.read_bytes()
    at = data.index(b"a red thing")
    damaged = {
        "cut": data[:-20],
        "empty": b"",
        "flipped byte": data[: at + 3] + b"R" + data[at + 4 :],
        "not parquet": b"x" * 500,
    }
    part.write_bytes(damaged[damage])
    (tmp_path / "c" / "index.json").unlink()
    prepare(run)
    assert contents(tmp_path / "c") == whole
