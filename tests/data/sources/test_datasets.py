"""Data sets that Hugging Face's `datasets` saved, and arrow files."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import pickapic_rows, png
from tests.data.sources.reading import good, read


def hugging_face(columns: dict[str, list[Any]], images: tuple[str, str]) -> Any:
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
    datasets.Dataset.from_list(pickapic_rows(3)).save_to_disk(str(tmp_path / "d"))
    assert good(read(tmp_path / "d")[1]) == ("a blue thing 1", png(3), png(2))


def test_saved_dataset_dict(tmp_path: Path) -> None:
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
