"""CLIP's own tokenizers are built from the published table of merges, and padded as SDXL's are."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import pytest

from mapo_fast.models.tokenizers import clip_tokenizer, clip_vocabulary


def published() -> bytes:
    """The table in open_clip_torch, which cannot be imported without what it asks for."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None, "make install puts open_clip_torch into the environment"
    assert spec.origin is not None
    return gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())


def test_the_merges_are_the_published_ones() -> None:
    vocabulary, merges = clip_vocabulary()
    assert merges == published().decode().split("\n")[1 : len(merges) + 1]
    assert len(vocabulary) == 49408
    # ids that anybody can check against SDXL's own vocab.json
    known = {"!": 0, "a</w>": 320, "cat</w>": 2368, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known


@pytest.mark.parametrize(("which", "pad"), [(1, 49407), (2, 0)])
def test_prompts_become_clips_tokens(which: int, pad: int) -> None:
    tokenizer = clip_tokenizer(which)  # type: ignore[arg-type]
    ids = tokenizer("A photo of  a CAT", padding="max_length", max_length=77).input_ids
    assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[7:] == [pad] * 70
