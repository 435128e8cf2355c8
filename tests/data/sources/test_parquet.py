"""Parquet files of any row group size: little memory, one pass over each row group, damage in one line."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mapo_fast.data.sources import parquet as parquet_pairs
from mapo_fast.data.sources.base import MissingImageError, PairRecord
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import pickapic_rows, png, write_parquet
from tests.data.sources.reading import good, read, reasons

READ = """
import os
import subprocess
import sys
from pathlib import Path
import pyarrow as pa
from mapo_fast.data.sources.registry import open_source

pairs = open_source(Path(sys.argv[1]))
size = 0
for start in range(0, len(pairs), 1000):
    for row in pairs.read(range(start, min(start + 1000, len(pairs)))):
        size += len(row.chosen()) + len(row.rejected())
print(size, pa.default_memory_pool().max_memory(), pa.total_allocated_bytes())
"""


@pytest.mark.slow
def test_a_huge_row_group_is_not_held_whole(tmp_path: Path) -> None:
    rows, size = 20_000, 1500
    columns: dict[str, list[Any]] = {"prompt": ["a thing"] * rows}
    rng = np.random.default_rng(0)
    columns |= {name: [rng.bytes(size) for _ in range(rows)] for name in ("chosen", "rejected")}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)  # as a person writes it
    assert pq.read_metadata(path).num_row_groups == 1
    assert path.stat().st_size > 2 * rows * size
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", READ, path], env=environment, check=True, capture_output=True)
    read, peak, left = map(int, out.stdout.split())
    assert read == 2 * rows * size
    assert peak < 0.4 * read, f"{peak >> 20} MiB of {read >> 20}"
    assert left == 0, "nothing is held after the last row"


def test_pages_that_take_much_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", pickapic_rows(8), row_group=8)
    assert open_source(path).note == ""
    monkeypatch.setattr(parquet_pairs, "LARGE", 1000)
    note = open_source(path).note
    assert note.startswith("reading a.parquet takes up to 0.0 GB of memory")
    assert "row_group_size=100" in note


def test_parts_of_one_row_group_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", pickapic_rows(40), row_group=40)
    passes: list[tuple[str, ...]] = []
    real = pq.ParquetFile.iter_batches

    def watched(self: Any, size: int, **options: Any) -> Any:
        passes.append(tuple(options["columns"]))
        return real(self, size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    pairs = open_source(path)
    for start in range(0, 40, 5):
        assert [row.index for row in pairs.read(range(start, start + 5))] == list(range(start, start + 5))
    assert len(passes) == 2, "the small columns once and the images once"
    assert [row.index for row in pairs.read([3])] == [3], "an earlier row starts anew"
    first, second = iter(pairs.read([1, 5])), iter(pairs.read([2, 4]))
    assert [next(one).index for one in (first, second, first, second)] == [1, 2, 5, 4]


def damaged(data: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for at in rng.integers(0, len(out), 8):
        out[at] = rng.integers(0, 256)
    return bytes(out[: len(out) - int(rng.integers(0, 2)) * 50])


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row | {"jpg_1": b"x" * 50} for row in pickapic_rows(6)])
    data, said = path.read_bytes(), []
    for seed in range(60):
        path.write_bytes(damaged(data, seed))
        try:
            pairs = open_source(path)
            if len(pairs) < 1000:
                list(pairs.read(range(len(pairs))))
        except UserError as error:
            said.append(str(error))
    assert len(said) > 10
    assert not [text for text in said if "\n" in text or "a.parquet" not in text]


def test_names_of_columns_and_splits_are_printed_as_they_are(tmp_path: Path) -> None:
    evil = "\x1b[2J\nmapo-fast: all is well"
    pq.write_table(pa.table({evil: [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "a.parquet").unlink()
    if sys.platform != "win32":
        for split in (evil, "b"):
            write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", pickapic_rows(1))
        with pytest.raises(UserError, match="mixes") as error:
            open_source(tmp_path)
        assert "\x1b" not in str(error.value)


def test_pickapic_file(tmp_path: Path) -> None:
    rows = read(write_parquet(tmp_path / "a.parquet", pickapic_rows(10)))
    assert good(rows[0]) == ("a blue thing 0", png(0), png(1))
    assert good(rows[1]) == ("a blue thing 1", png(3), png(2)), "label_0 = 0: jpg_1 is chosen"
    assert rows[9].name == "a.parquet:9"


def test_pickapic_rows_that_are_no_pairs(tmp_path: Path) -> None:
    ok = pickapic_rows(1)[0]
    table = [
        ok,
        ok | {"label_0": 0.5, "label_1": 0.5},
        ok | {"has_label": False},
        ok | {"label_0": None, "label_1": None},
        ok | {"caption": "  \n"},
        ok | {"caption": None},
        ok | {"label_0": 1.0, "label_1": 1.0},
        ok | {"label_0": 0.7, "label_1": 0.7},
    ]
    assert reasons(write_parquet(tmp_path / "a.parquet", table)) == [
        "", "tie", "no label", "no label", "empty caption", "missing caption", "bad label", "bad label",
    ]  # fmt: skip


def test_pickapic_without_bytes(tmp_path: Path) -> None:
    rows = [*pickapic_rows(1), pickapic_rows(1)[0] | {"jpg_0": None}]
    pairs = open_source(write_parquet(tmp_path / "a.parquet", rows))
    (broken,) = pairs.read([1])
    assert isinstance(broken, PairRecord)
    with pytest.raises(MissingImageError, match="no bytes"):
        broken.chosen()


def test_parquet_folder_any_rows_in_ascending_order(tmp_path: Path) -> None:
    table = pickapic_rows(11)
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", table[:6])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", table[6:])
    pairs = open_source(tmp_path)
    assert len(pairs) == 11
    found = {}
    for row in pairs.read([1, 2, 5, 6, 10]):
        found[row.index] = good(row)
    assert found == {
        i: (f"a blue thing {i}", png(2 * i + i % 2), png(2 * i + 1 - i % 2)) for i in (1, 2, 5, 6, 10)
    }


def test_only_needed_columns_and_row_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pickapic_rows(4) + pickapic_rows(4, label_0=0.5, label_1=0.5) + pickapic_rows(4)
    path = write_parquet(tmp_path / "a.parquet", [row | {"extra": "x" * 1000} for row in table])
    seen: list[tuple[int, tuple[str, ...]]] = []
    real = pq.ParquetFile.iter_batches

    def watched(self: Any, size: int, *, row_groups: list[int], columns: list[str]) -> Any:
        seen.append((row_groups[0], tuple(columns)))
        return real(self, size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert Counter(type(row).__name__ for row in read(path)) == {"PairRecord": 8, "SkippedRow": 4}
    images = [(group, columns) for group, columns in seen if "jpg_0" in columns]
    assert images == [(0, ("jpg_0", "jpg_1")), (2, ("jpg_0", "jpg_1"))], "no images of ties"
    assert not any("extra" in columns for _, columns in seen)


def test_train_split_is_taken_and_said(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", pickapic_rows(3))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pickapic_rows(5))
    pairs = open_source(tmp_path)
    assert len(pairs) == 3
    assert "train is used" in pairs.note


@pytest.mark.parametrize(
    "names", [("train.parquet", "test.parquet"), ("a/train/0.parquet", "a/test/0.parquet")]
)
def test_splits_told_apart_by_files_and_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, rows in zip(names, (3, 5), strict=True):
        write_parquet(tmp_path / name, pickapic_rows(rows))
    pairs = open_source(tmp_path)
    assert len(pairs) == 3, "held-out rows are not trained on"
    assert "has the splits test, train; train is used" in pairs.note


def test_splits_without_train_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", pickapic_rows(3))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pickapic_rows(5))
    with pytest.raises(UserError, match=r"mixes test-\*, validation-\*"):
        open_source(tmp_path)


def test_parquet_with_other_columns_names_them(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x", "picture": b"y"}])
    with pytest.raises(
        UserError, match=r"a\.parquet has the columns picture, text; needed are jpg_0, .* rejected"
    ):
        open_source(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file"):
        open_source(path)
