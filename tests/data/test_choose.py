"""Which rows become pairs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mapo_fast.data.cache import PairCache
from mapo_fast.data.choose import image_key
from mapo_fast.data.prepare import prepare
from mapo_fast.data.scan import content_hash
from tests.data.images.test_colour import profile
from tests.data.pair_sources import (
    config,
    encoded,
    jsonl_folder,
    pickapic_rows,
    picture,
    png,
    skipped,
    write_jsonl,
    write_parquet,
)
from tests.data.preparing import counting_images, one_pair, said


def test_each_distinct_prompt_and_image_is_stored_once(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = tmp_path / "s"
    for name in "abc":
        source.mkdir(exist_ok=True)
        (source / f"{name}.png").write_bytes(png(ord(name)))
    (source / "copy.png").write_bytes(png(ord("a")))
    row = {"prompt": "red", "chosen": "a.png", "rejected": "b.png"}
    write_jsonl(
        source,
        [row, row, row | {"chosen": "copy.png"}, row | {"rejected": "c.png"}, row | {"prompt": "blue"}],
    )
    with counting_images() as counts:
        summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert (summary.pairs, summary.images, summary.prompts, summary.duplicates) == (3, 3, 2, 2)
    assert sum(counts) == 3


def test_contradicting_rows_are_both_skipped(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    write_jsonl(source, rows)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=1.0))
    assert summary.pairs == 3
    assert skipped(tmp_path / "c") == {"pairs.jsonl:1": "contradiction", "pairs.jsonl:5": "contradiction"}


@pytest.mark.slow
def test_every_bad_row_is_listed_with_its_reason(tiny_sdxl: Path, tmp_path: Path) -> None:
    bad = {
        "zero-byte image": b"",
        "unreadable image": b"no image",
        "truncated image": png(1, 64, 64)[:5000],
        "unsupported pixel format": encoded(Image.new("F", (32, 32)), "TIFF"),
        "too much crop": png(3, 16, 400),
        "identical images": png(0),
    }
    ok = pickapic_rows(1)[0]
    rows = [ok, *(ok | {"jpg_0": png(0), "jpg_1": data} for data in bad.values())]
    rows += [ok | {"label_0": 0.5, "label_1": 0.5}, ok | {"has_label": False}, ok | {"caption": ""}]
    rows += [ok | {"jpg_1": None}]
    source = write_parquet(tmp_path / "a.parquet", rows)
    summary, text = said(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.95))
    expected = [*bad, "tie", "no label", "empty caption", "missing image"]
    assert skipped(tmp_path / "c") == {f"a.parquet:{i}": reason for i, reason in enumerate(expected, start=1)}
    assert summary.pairs == 1
    assert summary.skipped == dict.fromkeys(sorted(expected), 1)
    for reason in expected:
        assert f"1 × {reason}" in text


def test_one_bucket_per_pair_and_upscaled_counted(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1, 64, 32), png(2, 24, 14))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0, size_conditioning="own"))
    cache = PairCache.open(tmp_path / "c")
    height, width = cache.train[0].bucket
    assert height > width
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert batch.chosen_latents.shape == batch.rejected_latents.shape == (1, 4, height // 4, width // 4)
    assert summary.upscaled == 1
    assert batch.time_ids_chosen[0, :2].tolist() == [64, 32]
    assert batch.time_ids_rejected[0, :2].tolist() == [24, 14]
    assert batch.time_ids_rejected[0, 4:].tolist() == [height, width]


@pytest.mark.slow
def test_latents_of_an_earlier_version_are_not_taken_for_converted_ones(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    source = jsonl_folder(tmp_path / "s", 3)
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    (source / "0w.png").write_bytes(data := encoded(picture(0), icc_profile=profile("wide")))
    assert image_key(content_hash(data), (32, 32), "converted") != image_key(content_hash(data), (32, 32))
    assert prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)).converted == 1
