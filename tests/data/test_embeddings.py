"""Prompts through the text encoders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.text import TextEncoder, empty_prompt
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    jsonl_folder,
    png,
    skipped,
    write_jsonl,
)
from tests.data.preparing import one_pair
from tests.tiny import make_tiny_sdxl


def test_truncated_prompts_are_listed(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1), png(2), prompt="x" * 80)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert summary.truncated == 1
    row = json.loads((tmp_path / "c" / "truncated.jsonl").read_text())
    assert row == {"prompt": "x" * 80, "tokens": 80, "kept": 75, "cut": "x" * 5}


@pytest.mark.slow
@pytest.mark.parametrize(("max_tokens", "sequence"), [(150, 154), (225, 231)])
def test_long_prompts(tiny_sdxl: Path, tmp_path: Path, max_tokens: int, sequence: int) -> None:
    source = jsonl_folder(tmp_path / "s", 2)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(source, [rows[0], rows[1] | {"prompt": "x" * 140}])
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0, max_tokens=max_tokens))
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=[True, False])
    assert batch.prompt_embeds.shape == (2, sequence, 40)
    assert summary.truncated == 0


def nan_for(monkeypatch: pytest.MonkeyPatch, word: str, which: int) -> None:
    """One encoder gives NaN for prompts with a word in them."""
    call = TextEncoder.__call__

    def damaged(self: Any, prompts: Any) -> Any:
        hidden, pooled = call(self, prompts)
        if self.which == which:
            (pooled if which == 2 else hidden)[[word in prompt for prompt in prompts]] = torch.nan
        return hidden, pooled

    monkeypatch.setattr(TextEncoder, "__call__", damaged)


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, 2])
def test_prompts_whose_embeddings_are_not_finite_are_listed(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    nan_for(monkeypatch, "thing 3", which)
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)
    summary = prepare(run)
    assert summary.skipped == {"non-finite embedding": 1}
    assert skipped(tmp_path / "c") == {"pairs.jsonl:4": "non-finite embedding"}
    assert (summary.pairs, summary.images) == (5, 10)
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert batch.prompt_embeds.isfinite().all()
    assert batch.prompt_embeds.abs().max() < 65504
    assert batch.pooled_embeds.isfinite().all()
    with pytest.raises(UserError, match=r"1 × non-finite embedding.*text encoders are damaged: copy"):
        prepare(config(tiny_sdxl, source, tmp_path / "d", max_skipped=0.1))
    assert not list((tmp_path / "d" / "shards").glob("latents-*")), "known before images are encoded"
    (tmp_path / "c" / "index.json").unlink()
    monkeypatch.setattr(Pipeline, "load_text_encoder", None)
    assert prepare(run).skipped == summary.skipped, "known without encoding again"


@pytest.mark.slow
def test_an_empty_prompt_that_is_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_sdxl(tmp_path / "m", force_zeros=False)
    nan_for(monkeypatch, "", 2)
    with pytest.raises(UserError, match=r"text_encoder_2 gives values for the empty prompt that are not"):
        prepare(config(model, jsonl_folder(tmp_path / "s", 3), tmp_path / "c"))
    monkeypatch.undo()
    assert prepare(config(model, tmp_path / "s", tmp_path / "c")).pairs == 3


def test_embeddings_too_large_for_fp16_are_kept_in_fp32(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = TextEncoder.__call__

    def large(self: Any, prompts: Any) -> Any:
        hidden, pooled = call(self, prompts)
        return hidden * 1e6, pooled

    monkeypatch.setattr(TextEncoder, "__call__", large)
    source = one_pair(tmp_path / "s", png(1), png(2))
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    embeds = cache.batch(cache.train, flip=None, drop=None).prompt_embeds
    assert embeds.isfinite().all()
    assert embeds.abs().max() > 1e6


@pytest.mark.slow
def test_empty_prompt_of_a_pipeline_that_encodes_it(tmp_path: Path) -> None:
    model = make_tiny_sdxl(tmp_path / "m", force_zeros=False)
    prepare(config(model, one_pair(tmp_path / "s", png(1), png(2)), tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=[True])
    empty = empty_prompt(open_sdxl(model), max_tokens=77, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(batch.prompt_embeds, empty.prompt_embeds, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(batch.pooled_embeds, empty.pooled_embeds, rtol=2e-3, atol=1e-3)
    assert batch.prompt_embeds.any()


def test_text_is_encoded_before_images(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any) -> None:
        raise UserError("no such encoder")

    monkeypatch.setattr(Pipeline, "load_text_encoder", missing)
    with pytest.raises(UserError, match="no such encoder"):
        prepare(config(tiny_sdxl, jsonl_folder(tmp_path / "s", 3), tmp_path / "c"))
    assert not list((tmp_path / "c" / "shards").glob("latents-*"))
