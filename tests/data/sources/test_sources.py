import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from mapo_fast.data.sources.base import MissingImageError, PairRecord, SkippedRow
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import pickapic_rows, png, write_jsonl, write_parquet


def read(source: Path) -> list[PairRecord | SkippedRow]:
    pairs = open_source(source)
    rows = []
    for row in pairs.read(range(len(pairs))):
        if isinstance(row, PairRecord):  # getters are valid until the next row
            chosen, rejected = row.chosen(), row.rejected()
            row = PairRecord(
                row.index,
                row.name,
                row.prompt,
                lambda c=chosen: c,
                lambda r=rejected: r,  # type: ignore[misc]
            )
        rows.append(row)
    assert [row.index for row in rows] == list(range(len(pairs)))
    return rows


def good(row: PairRecord | SkippedRow) -> tuple[str, bytes, bytes]:
    assert isinstance(row, PairRecord), row
    return row.prompt, row.chosen(), row.rejected()


def reasons(source: Path) -> list[str]:
    return [row.reason if isinstance(row, SkippedRow) else "" for row in read(source)]


# Pick-a-Pic parquet


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


# Hugging Face datasets


def hugging_face(columns: dict[str, list[Any]], images: tuple[str, str]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    cells = {k: [{"bytes": v, "path": None} for v in vs] if k in images else vs for k, vs in columns.items()}
    features = datasets.Features(
        {k: datasets.Image() if k in images else datasets.Value("string") for k in columns}
    )
    return datasets.Dataset.from_dict(cells, features=features)


def triples(count: int) -> Any:
    columns = {
        "prompt": [f"thing {i}" for i in range(count)],
        "chosen": [png(2 * i) for i in range(count)],
        "rejected": [png(2 * i + 1) for i in range(count)],
    }
    return hugging_face(columns, ("chosen", "rejected"))


EXPECTED = [(f"thing {i}", png(2 * i), png(2 * i + 1)) for i in range(3)]


def test_saved_dataset(tmp_path: Path) -> None:
    triples(3).save_to_disk(str(tmp_path / "d"))
    assert [good(row) for row in read(tmp_path / "d")] == EXPECTED


def test_saved_dataset_with_pickapic_columns(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(pickapic_rows(3)).save_to_disk(str(tmp_path / "d"))
    assert good(read(tmp_path / "d")[1]) == ("a blue thing 1", png(3), png(2))


def test_saved_dataset_dict(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict(train=triples(3), test=triples(1))
    both.save_to_disk(str(tmp_path / "d"))
    pairs = open_source(tmp_path / "d")
    assert "train is used" in pairs.note
    assert [good(row) for row in read(tmp_path / "d")] == EXPECTED
    datasets.DatasetDict(a=triples(1), b=triples(1)).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(UserError, match="has the splits a, b"):
        open_source(tmp_path / "e")


def test_dataset_folder_with_parquet_images(tmp_path: Path) -> None:
    triples(3).to_parquet(str(tmp_path / "data-00000-of-00001.parquet"))
    assert [good(row) for row in read(tmp_path)] == EXPECTED


def test_folder_of_arrow_files(tmp_path: Path) -> None:
    triples(3).save_to_disk(str(tmp_path / "d"))
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "d" / name).unlink()
    assert [good(row) for row in read(tmp_path / "d")] == EXPECTED


def test_damaged_dataset(tmp_path: Path) -> None:
    triples(1).save_to_disk(str(tmp_path / "d"))
    (tmp_path / "d" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(tmp_path / "d")


# Folders


def test_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "images" / f"{name}.png").write_bytes(png(ord(name)))
    (tmp_path / "secret.png").write_bytes(png(9))
    ok = {"prompt": " ä cat ", "chosen": "images/a.png", "rejected": "images/b.png"}
    write_jsonl(
        folder,
        [
            ok,
            "",
            "{broken",
            [1, 2],
            {"prompt": "x", "chosen": "images/a.png"},
            ok | {"prompt": ""},
            {k: v for k, v in ok.items() if k != "prompt"},
            ok | {"rejected": "images/c.png"},
            ok | {"rejected": "../secret.png"},
            ok | {"rejected": str(tmp_path / "secret.png")},
            ok | {"rejected": str(folder / "images" / "a.png")},
            ok | {"rejected": "images/../images/b.png"},
        ],
    )
    rows = read(folder)
    assert good(rows[0]) == ("ä cat", png(ord("a")), png(ord("b")))
    assert rows[1].name == "pairs.jsonl:3"
    assert reasons(folder) == [
        "", "bad line", "bad line", "bad line", "empty caption", "missing caption", "missing image",
        "path outside the folder", "path outside the folder", "path outside the folder", "",
    ]  # fmt: skip
    assert [r.index for r in read(folder / "pairs.jsonl")] == [r.index for r in rows], (
        "the file's own name works"
    )


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


# Opening


def test_missing_and_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source not found: .*nowhere"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "chosen").mkdir()
    for source in (tmp_path, _text(tmp_path / "notes.txt")):
        with pytest.raises(UserError) as error:
            open_source(source)
        for part in ("pairs.jsonl", "chosen/ + rejected/", "w/ + l/", "Hugging Face", "*.parquet"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "rejected").mkdir()
    with pytest.raises(UserError, match="hold no images"):
        open_source(tmp_path)


def _text(path: Path) -> Path:
    path.write_text("x")
    return path


def test_identity_changes_with_the_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}])
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    before = open_source(tmp_path).identity()
    assert open_source(tmp_path).identity() == before
    (tmp_path / "b.png").write_bytes(png(0, 40))
    assert open_source(tmp_path).identity() != before


# Mistakes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "half a \ud83d smile"}, "bad caption"),
        ({"chosen": "a\0b.png"}, "missing image"),
        ({"chosen": "x" * 300 + ".png"}, "missing image"),
        ({"rejected": "\ud800.png"}, "missing image"),
        ("[" * 100_000, "bad line"),
        ("9" * 5000, "bad line"),
    ],
    ids=["surrogate in prompt", "NUL", "long name", "surrogate in path", "nested", "long number"],
)
def test_one_bad_line_is_one_skipped_row(tmp_path: Path, line: Any, reason: str) -> None:
    for name in ("w.png", "l.png"):
        (tmp_path / name).write_bytes(png(1))
    ok = {"prompt": "a", "chosen": "w.png", "rejected": "l.png"}
    write_jsonl(tmp_path, [ok, line if isinstance(line, str) else ok | line, ok])
    assert reasons(tmp_path) == ["", reason, ""]
    open_source(tmp_path).identity()


def test_a_table_beside_twin_folders_wins_and_says_so(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.png").write_bytes(png(1))
    assert not open_source(tmp_path).note
    write_jsonl(tmp_path, ["{}", "{}"])
    pairs = open_source(tmp_path)
    assert len(pairs) == 2
    assert "pairs.jsonl and the folders chosen/ + rejected/: pairs.jsonl is used" in pairs.note


def test_source_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    def refusing(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(UserError, match=r"^data\.source .* cannot be read: Permission denied$"):
        open_source(tmp_path)


def test_subfolder_without_permission_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

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


def test_an_arrow_file_with_wrong_offsets_is_one_line(tmp_path: Path) -> None:
    """It is mapped as it is: reading it would crash the process."""
    rows = [{"prompt": "a", "chosen": png(0), "rejected": png(1)}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    path = next((tmp_path / "d").glob("*.arrow"))
    data = path.read_bytes()
    place = data.rfind(b"\0\0\0\0" + len(png(1)).to_bytes(4, "little"))  # where its bytes begin and end
    assert place > 0
    path.write_bytes(data[: place + 4] + b"\xff\xff\xff\x7f" + data[place + 8 :])
    pairs = open_source(tmp_path / "d")
    with pytest.raises(UserError, match=r"data\.source .* is damaged: "):
        list(pairs.read([0]))
