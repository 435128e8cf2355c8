"""Prompts that are the same to the tokenizers."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.text import TextEncoder
from tests.data.pair_sources import (
    config,
    png,
    skipped,
    write_jsonl,
)

SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda prompt: prompt,
    str.upper,
    lambda prompt: prompt.replace(" ", "  "),
    lambda prompt: prompt.replace("e", "e\u0301"),  # NFD
    lambda prompt: prompt.replace("e", "\u00e9"),  # NFC of the same
)


def spelled_folder(folder: Path, prompts: list[str]) -> Path:
    """A pair of images of its own for every prompt."""
    rows = []
    folder.mkdir()
    for i, prompt in enumerate(prompts):
        for side, name in enumerate("wl"):
            (folder / f"{i}{name}.png").write_bytes(png(2 * i + side))
        rows.append({"prompt": prompt, "chosen": f"{i}w.png", "rejected": f"{i}l.png"})
    write_jsonl(folder, rows)
    return folder


@pytest.mark.slow
def test_prompts_with_the_same_tokens_stay_on_one_side_and_are_encoded_once(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [f"a red thing {letter}" for letter in "abcdefghij"]
    source = spelled_folder(tmp_path / "s", [spell(thing) for thing in things for spell in SPELLINGS])
    encoded: list[str] = []
    call = TextEncoder.__call__

    def counted(self: Any, prompts: Any) -> Any:
        encoded.extend(prompts if self.which == 1 else ())
        return call(self, prompts)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.3))
    assert summary.pairs == 50
    assert summary.prompts == len(encoded) == 20, "with and without an accent"
    cache = PairCache.open(tmp_path / "c")
    sides = [
        {" ".join(unicodedata.normalize("NFC", row.prompt).lower().split()) for row in cache.rows(part)}
        for part in (cache.train, cache.held_out)
    ]
    assert len(cache.held_out) >= 10
    assert not sides[0] & sides[1]


def test_spellings_do_not_hide_duplicates_and_contradictions(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = spelled_folder(tmp_path / "s", ["a red cat", "a blue cat", "a green cat"])
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"prompt": "A  RED cat"})
    rows.append({"prompt": "A Blue CAT", "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]})
    write_jsonl(source, rows)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.5, held_out=0.0))
    assert (summary.pairs, summary.duplicates) == (2, 1)
    assert skipped(tmp_path / "c") == {"pairs.jsonl:2": "contradiction", "pairs.jsonl:5": "contradiction"}


@pytest.mark.slow
def test_prompts_that_differ_beyond_the_last_token_only_are_the_same(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = spelled_folder(tmp_path / "s", ["x" * 80, "x" * 90, "x" * 70])
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert (summary.prompts, summary.truncated) == (2, 2)
    assert prepare(config(tiny_sdxl, source, tmp_path / "d", held_out=0.0, max_tokens=150)).prompts == 3


@pytest.mark.slow
def test_a_spelling_that_comes_later_is_not_encoded(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = spelled_folder(tmp_path / "s", ["a red cat", "a blue cat"])
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)
    prepare(run)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    (source / "x.png").write_bytes(png(77))
    write_jsonl(
        source, rows + [rows[0] | {"prompt": p, "chosen": "x.png"} for p in ("A RED CAT", "a Red cat")]
    )
    monkeypatch.setattr(Pipeline, "load_text_encoder", None)
    summary = prepare(run)
    assert (summary.pairs, summary.prompts, summary.duplicates) == (3, 2, 1)
