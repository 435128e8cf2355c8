"""Split, time ids, warnings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.util.errors import UserError
from tests.data.images.test_colour import profile
from tests.data.pair_sources import (
    config,
    encoded,
    jsonl_folder,
    pickapic_rows,
    picture,
    png,
    write_jsonl,
    write_parquet,
)
from tests.data.preparing import one_pair, said


def test_shared_conditioning_gives_both_images_the_same_ids(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1, 64, 32), png(2, 24, 14))
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert torch.equal(batch.time_ids_chosen, batch.time_ids_rejected)


@pytest.mark.slow
def test_size_that_predicts_the_label_is_warned_about(tiny_sdxl: Path, tmp_path: Path) -> None:
    rows = [row | {"jpg_0": png(i, 32), "jpg_1": png(i, 64, 64)} for i, row in enumerate(pickapic_rows(6))]
    rows = [row | {"label_0": 1.0, "label_1": 0.0} for row in rows]
    source = write_parquet(tmp_path / "a.parquet", rows)
    summary, text = said(config(tiny_sdxl, source, tmp_path / "c"))
    assert [w for w in summary.warnings if "image size alone predicts the label (AUC 0.00" in w]
    assert "warning: image size alone predicts the label" in text
    again, _ = said(config(tiny_sdxl, source, tmp_path / "c"))
    assert again.warnings == summary.warnings


@pytest.mark.slow
def test_split_is_stored_and_does_not_share_prompts(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 20, prompts=10)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.2))
    cache = PairCache.open(tmp_path / "c")
    assert (len(cache.train), len(cache.held_out)) == (summary.train, summary.held_out) == (16, 4)
    prompts = [{row.prompt for row in cache.rows(part)} for part in (cache.train, cache.held_out)]
    assert len(prompts[1]) == 2
    assert not prompts[0] & prompts[1]


def test_one_component_warns_that_nothing_is_held_out(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6, prompts=1)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c"))
    assert summary.held_out == 0
    assert [w for w in summary.warnings if w.startswith("no pair is held out")]


@pytest.mark.slow
def test_result_does_not_depend_on_row_order(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 10)
    prepare(config(tiny_sdxl, source, tmp_path / "a", held_out=0.3))
    rows = (source / "pairs.jsonl").read_text().splitlines()
    write_jsonl(source, rows[::-1])
    prepare(config(tiny_sdxl, source, tmp_path / "b", held_out=0.3))
    one, two = (PairCache.open(tmp_path / name) for name in "ab")
    for part in ("train", "held_out"):
        assert [p.id for p in getattr(one, part)] == [p.id for p in getattr(two, part)]
    batches = [cache.batch(cache.held_out, flip=None, drop=None) for cache in (one, two)]
    np.testing.assert_allclose(*(b.chosen_latents for b in batches), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*(b.prompt_embeds for b in batches), rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_another_held_out_share_encodes_nothing(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 10)
    assert prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.1)).held_out == 1
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.3)
    with pytest.raises(UserError, match=r"held_out = 0\.1, the config says 0\.3"):
        PairCache.open(tmp_path / "c").check(open_sdxl(tiny_sdxl), run.data)
    monkeypatch.setattr(Pipeline, "load_vae", None)
    monkeypatch.setattr(Pipeline, "load_text_encoder", None)
    assert prepare(run).held_out == 3


@pytest.mark.slow
def test_converted_profiles_are_counted_and_a_leak_is_said(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    for i in range(6):
        (source / f"{i}w.png").write_bytes(encoded(picture(2 * i), icc_profile=profile("wide")))
    (source / "0l.png").write_bytes(encoded(picture(1), icc_profile=b"nonsense"))
    (source / "1l.png").write_bytes(encoded(picture(3), icc_profile=profile("srgb")))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert (summary.converted, summary.ignored_profiles) == (6, 1)
    assert [text for text in summary.warnings if "100% of the chosen and 0% of the rejected images" in text]
