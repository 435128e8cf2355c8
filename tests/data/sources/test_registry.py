"""Layouts are found by name alone, and one from outside the package is as good as ours."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.data.sources import registry
from mapo_fast.data.sources.base import PreferencePairs
from mapo_fast.data.sources.datasets import DatasetPairs
from mapo_fast.data.sources.folders import TwinFolderPairs
from mapo_fast.data.sources.jsonl import JsonlPairs
from mapo_fast.data.sources.parquet import ParquetPairs
from mapo_fast.data.sources.registry import find_source, known_sources, open_source, register_source
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import png, skipped
from tests.pages import imported
from tests.training import make_config


@pytest.fixture
def csv_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The source of `docs/extend/data_source.md`, from a file outside the package."""
    (tmp_path / "plugin").mkdir()
    monkeypatch.setattr(registry, "_registered", [])
    with imported("data_source", tmp_path / "plugin") as module:
        module.register()
        yield module


def csv_folder(
    folder: Path, rows: int, *more: dict[str, str], columns: str = "prompt chosen rejected"
) -> Path:
    folder.mkdir()
    table = []
    for i in range(rows):
        for side, name in enumerate("wl"):
            (folder / f"{i}{name}.png").write_bytes(png(2 * i + side))
        table.append({"prompt": f"thing {i}", "chosen": f"{i}w.png", "rejected": f"{i}l.png"})
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns.split(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*table, *more])
    return folder


def run(model: Path, tmp_path: Path, **data: Any) -> Any:
    data = {"source": str(tmp_path / "s"), **data}
    return make_config(model, tmp_path / "c", tmp_path / "run", data=data, train={"steps": 2, "log_every": 1})


@pytest.mark.slow
def test_a_source_from_outside_trains(tiny_sdxl: Path, tmp_path: Path, csv_pairs: ModuleType) -> None:
    csv_folder(
        tmp_path / "s",
        12,
        {"prompt": " ", "chosen": "0w.png", "rejected": "0l.png"},
        {"prompt": "out", "chosen": "../secret.png", "rejected": "0l.png"},
    )
    (tmp_path / "secret.png").write_bytes(png(99))
    config = run(tiny_sdxl, tmp_path, max_skipped=0.5)
    assert prepare(config).pairs == 12
    assert skipped(tmp_path / "c") == {
        "pairs.csv:13": "empty caption",
        "pairs.csv:14": "path outside the folder",
    }
    cache = PairCache.open(tmp_path / "c")
    assert {row.prompt for row in cache.rows([*cache.train])} < {f"thing {i}" for i in range(12)}
    assert fit(config).finished
    steps = [entry for entry in read_log(tmp_path / "run" / "log.jsonl") if entry["event"] == "step"]
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) for step in steps)
    before = open_source(tmp_path / "s").identity()
    (tmp_path / "s" / "3w.png").write_bytes(png(1234))
    assert open_source(tmp_path / "s").identity() != before


def test_a_source_from_outside_says_what_it_lacks(tmp_path: Path, csv_pairs: ModuleType) -> None:
    csv_folder(tmp_path / "s", 1, columns="prompt chosen")
    with pytest.raises(UserError, match=r"pairs\.csv has no column rejected: needed are prompt, chosen"):
        open_source(tmp_path / "s")


def test_what_is_looked_for_is_what_is_registered(tmp_path: Path, csv_pairs: ModuleType) -> None:
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "plugin")
    assert str(error.value).endswith(
        "no layout that is known here; looked for pairs.csv, pairs.jsonl, chosen/ + rejected/ folders, "
        "w/ + l/ folders, a Hugging Face dataset (state.json or *.arrow), *.parquet"
    )


def test_registered_ones_are_asked_first_and_once(csv_pairs: ModuleType) -> None:
    class Other(csv_pairs.CsvPairs):  # type: ignore[misc,name-defined]
        looked_for = "other.csv"

    built_in = (JsonlPairs, TwinFolderPairs, DatasetPairs, ParquetPairs)
    assert register_source(Other) is register_source(Other) is Other
    assert known_sources() == (Other, csv_pairs.CsvPairs, *built_in)


def test_half_a_source_is_refused() -> None:
    class Half(PreferencePairs):
        def __len__(self) -> int:
            return 0

    with pytest.raises(
        TypeError, match=r"Half is no source .* it lacks files, open, read, recognises, looked_for"
    ):
        register_source(Half)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("pairs.jsonl", "chosen/", "rejected/", "a.parquet"), JsonlPairs),
        (("w/", "l/a.parquet", "state.json"), TwinFolderPairs),
        (("state.json", "data.arrow", "images/a.parquet"), DatasetPairs),
        (("a.arrow", "deep/er/b.parquet"), ParquetPairs),
        (("deep/er/b.arrow", ".hidden.parquet"), DatasetPairs),
        (("deep/er/B.PARQUET",), ParquetPairs),
    ],
)
def test_which_layout_wins(tmp_path: Path, names: tuple[str, ...], kind: type[PreferencePairs]) -> None:
    for name in names:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"not read")
    assert find_source(tmp_path) is kind


def test_missing_and_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source not found: .*nowhere"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    for source in (tmp_path, _text(tmp_path / "notes.txt")):
        with pytest.raises(UserError) as error:
            open_source(source)
        for part in ("pairs.jsonl", "chosen/ + rejected/", "w/ + l/", "Hugging Face", "*.parquet"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)
    for name in ("chosen", "rejected"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="hold no images"):
        open_source(tmp_path)


def _text(path: Path) -> Path:
    path.write_text("x")
    return path


def test_source_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    def refusing(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(UserError, match=r"^data\.source .* cannot be read: Permission denied$"):
        open_source(tmp_path)
