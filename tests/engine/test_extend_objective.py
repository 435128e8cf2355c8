"""The objective of `docs/extend/objective.md`, from a file outside the package: configs and trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_kernels.objectives import OBJECTIVES, resolve
from tests.pages import imported
from tests.training import make_cache, make_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def _robust_dpo(tmp_path: Path) -> Iterator[None]:
    with imported("objective", tmp_path) as module, patch.dict(OBJECTIVES):
        module.register()
        yield
    resolve.cache_clear()


def config(model: Path, folder: Path, /, kind: str = "lora", **objective: Any) -> Config:
    return make_config(
        model,
        folder / "cache",
        folder / "run",
        objective={"name": "robust_dpo", **objective},
        adapter={"kind": kind},
        train={"steps": 3, "log_every": 1, "pairs_per_batch": 1, "gradient_checkpointing": False},
        optim={"warmup_steps": 0},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_robust_dpo")
def test_it_trains(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Every step's loss is the formula of its logit; at the start the model is its reference."""
    make_cache(tiny_sdxl, tmp_path)
    assert fit(config(tiny_sdxl, tmp_path, wrong=0.25)).finished
    steps = [entry for entry in read_log(tmp_path / "run" / "log.jsonl") if entry["event"] == "step"]
    assert len(steps) == 3
    assert abs(steps[0]["logits"]) < 1e-3 < abs(steps[2]["logits"])
    for step in steps:
        right, wrong = (math.log1p(math.exp(-sign * step["logits"])) for sign in (1, -1))
        assert math.isclose(step["loss"], (0.75 * right - 0.25 * wrong) / 0.5, rel_tol=1e-5)


@pytest.mark.usefixtures("_robust_dpo")
@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        ("lora", {"wrong": 0.5}, r"objective\.wrong = 0\.5 must be between 0 and 0\.5"),
        ("lora", {"beta": -1.0}, r"objective\.beta = -1 must be greater than 0"),
        (
            "lora",
            {"gamma": 1.0},
            r"objective\.gamma is not a setting of .*'robust_dpo', which has beta, wrong",
        ),
        ("lora", {"wrnog": 0.1}, "wrnog"),
        ("lora", {"form": "paper"}, r"objective\.form = 'paper' is of objective\.name = 'mapo'"),
        ("full", {"reference": "adapter"}, r"objective\.reference = 'adapter' switches a LoRA off"),
        ("lora", {"name": "dpo", "wrong": 0.1}, r"objective\.wrong is not a setting of .*'dpo'"),
    ],
)
def test_a_config_is_checked_by_its_entry(
    tmp_path: Path, kind: str, objective: dict[str, Any], message: str
) -> None:
    assert config(tmp_path, tmp_path, kind).reference == ("adapter" if kind == "lora" else "precomputed")
    with pytest.raises(UserError, match=message):
        config(tmp_path, tmp_path, kind, **objective)


def test_without_it_the_name_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective\.name.*'mapo', 'sft'"):
        config(tmp_path, tmp_path)
