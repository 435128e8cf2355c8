"""Prompts that a run was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_fast.data.cache import PairCache
from mapo_fast.run.train import fit
from mapo_fast.score.trained import prompts_of
from mapo_fast.util.errors import UserError
from tests.training import make_cache, make_config


@pytest.mark.slow
def test_of_a_run_and_of_its_cache(tiny_sdxl: Path, tmp_path: Path) -> None:
    cache = make_cache(tiny_sdxl, tmp_path / "data")
    fit(make_config(tiny_sdxl, cache, tmp_path / "run", train={"steps": 1}))
    opened = PairCache.open(cache)
    expected = {row.prompt for row in opened.rows(opened.train[:])}
    assert expected
    assert prompts_of(tmp_path / "run") == prompts_of(cache) == expected
    with pytest.raises(UserError, match="is not a mapo_fast cache"):
        prompts_of(tmp_path)
