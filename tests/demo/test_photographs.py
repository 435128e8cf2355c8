"""The photograph pairs: Pick-a-Pic's format, fair placing, a split by photograph, figures by kind."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="needs the `examples` extra")
pytest.importorskip("sklearn", reason="needs the `examples` extra")

from mapo_fast.data.sources.base import PairRecord
from mapo_fast.data.sources.registry import open_source
from mapo_fast.demo import photographs
from mapo_fast.demo.photographs import DEGRADATIONS, PHOTOGRAPHS, write_photographs
from mapo_fast.settings.load import load_config
from mapo_fast.util.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("photographs") / "out"
    write_photographs(out, seed=0, crops=2)
    return out


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(folder / "photographs.parquet").to_pylist()
    return table


def image(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


def squares(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(16, 4, 16, 4, 3)


@pytest.mark.slow
def test_rows_are_pick_a_pic_rows(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 2 * len(PHOTOGRAPHS) * len(DEGRADATIONS)
    for row in rows:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert row["has_label"] is True
        assert row["caption"] == PHOTOGRAPHS[row["photograph"]]
        assert image(row["jpg_0"]).shape == image(row["jpg_1"]).shape == (64, 64, 3)
    assert {row["kind"] for row in rows} == set(DEGRADATIONS)


def test_chosen_is_placed_at_random(rows: list[dict[str, Any]]) -> None:
    share = sum(row["label_0"] for row in rows) / len(rows)
    assert abs(share - 0.5) < 3 * (0.25 / len(rows)) ** 0.5


def test_the_rejected_image_is_the_degraded_one(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        first, second = image(row["jpg_0"]), image(row["jpg_1"])
        chosen, rejected = (first, second) if row["label_0"] == 1.0 else (second, first)
        assert not np.array_equal(chosen, rejected)
        if row["kind"] == "dark":
            assert rejected.mean() < 0.6 * chosen.mean()
        elif row["kind"] == "low_contrast":
            assert rejected.std() < 0.7 * chosen.std()
        elif row["kind"] == "pixelated":  # squares of 4×4 are nearly even, up to JPEG's own rounding
            assert squares(rejected).std(axis=(1, 3)).mean() < 0.7 * squares(chosen).std(axis=(1, 3)).mean()
        else:  # less fine detail
            assert np.abs(np.diff(rejected, 2, axis=0)).mean() < np.abs(np.diff(chosen, 2, axis=0)).mean()


@pytest.mark.slow
def test_same_seed_same_file_and_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    write_photographs(tmp_path / "again", seed=0, crops=2)
    before = (folder / "photographs.parquet").read_bytes()
    assert (tmp_path / "again" / "photographs.parquet").read_bytes() == before
    with pytest.raises(UserError, match="not an empty folder"):
        write_photographs(folder, seed=1)
    assert (folder / "photographs.parquet").read_bytes() == before


def test_the_product_reads_it(folder: Path, rows: list[dict[str, Any]]) -> None:
    config = load_config(folder / "config.toml")
    assert config.data.source is not None
    source = open_source(config.data.source)
    records = list(source.read(range(10)))
    for record, row in zip(records, rows[:10], strict=True):
        assert isinstance(record, PairRecord)
        assert record.prompt == row["caption"]
        assert record.chosen() == row["jpg_0" if row["label_0"] == 1.0 else "jpg_1"]
        # `score_photographs` finds a pair's kind by this number.
        assert int(record.name.rpartition(":")[2]) == record.index


def test_one_photograph_is_one_component_of_the_split(rows: list[dict[str, Any]]) -> None:
    captions = list(PHOTOGRAPHS.values())
    assert len(set(captions)) == len(captions) - 1  # the two views of the motorcycle are one scene
    seen: dict[bytes, str] = {}
    for row in rows:
        for side in ("jpg_0", "jpg_1"):
            assert seen.setdefault(row[side], row["caption"]) == row["caption"]


def test_score_of_a_kind_is_the_paired_change() -> None:
    rows = [{"kind": "blur", "caption": c} for c in "aabbcc"] + [{"kind": "dark", "caption": "a"}]
    start = np.array([0.0, 0.2, 0.1, 0.1, 0.0, 0.2, 0.9])
    trained = np.array([0.5, 0.7, 0.3, 0.5, 0.2, 0.6, 0.0])
    score = photographs._kind_score("blur", rows, start, trained)
    assert (score.pairs, score.photographs) == (6, 3)
    change = np.array([0.5, 0.5, 0.2, 0.4, 0.2, 0.4])
    assert score.change == pytest.approx(change.mean())
    half = 2.5706 * change.std(ddof=1) / 6**0.5  # Student's t with five degrees of freedom
    assert score.pairs_high - score.change == pytest.approx(half, rel=1e-4)
    means = np.array([0.5, 0.3, 0.3])  # Student's t with two degrees of freedom: 4.303
    assert score.change - score.photographs_low == pytest.approx(4.303 * means.std(ddof=1) / 3**0.5, rel=1e-3)


def test_scoring_before_training_says_what_to_do(folder: Path) -> None:
    with pytest.raises(UserError, match="mapo-fast train"):
        photographs.score_photographs(folder)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", {"no_such_package/a.png": "a"})
    with pytest.raises(UserError, match=r"mapo_fast\[examples\]"):
        write_photographs(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_path_survives_as_toml(folder: Path) -> None:
    text = (folder / "config.toml").read_text(encoding="utf-8")
    path = json.loads(next(line for line in text.splitlines() if line.startswith("path")).split("= ", 1)[1])
    assert load_config(folder / "config.toml").model.path == Path(path)
