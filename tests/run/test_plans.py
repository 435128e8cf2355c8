"""Whole runs under plans of the memory table: evaluation, previews, checkpoints, resume, result.

Every value of every setting has a run; tests/engine/test_engine.py takes the steps of all that go together.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.memory_table import ROWS
from mapo_fast.engine import offload_activations, stream_states, stream_weights
from mapo_fast.run.train import fit
from tests.covering import covering_plans
from tests.training import make_cache, make_config

RESULT = {"full": "unet/diffusion_pytorch_model.safetensors", "lora": "lora/pytorch_lora_weights.safetensors"}


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move also what is too small to be worth it."""
    monkeypatch.setattr(stream_weights, "STREAMED_BYTES", 1)
    monkeypatch.setattr(stream_states, "_SMALLEST", 1)
    monkeypatch.setattr(offload_activations, "OFFLOADED_BYTES", 1)


def sections(plan: dict[str, Any], **train_settings: Any) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {
        "train": {
            "precision": "pure_bf16",
            "steps": 3,
            "checkpoint_every": 1,
            "keep_checkpoints": 3,
            **train_settings,
        },
        "optim": {"name": "adamw8bit"},
        "speed": {"fused_ops": True},  # as on a GPU
        "preview": {"prompts": ["red square"], "every": 2, "steps": 1},
    }
    for name, value in plan.items():
        section, key = name.split(".")
        table.setdefault(section, {})[key] = value
    return table


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", covering_plans([plan for *_, plan in ROWS]), ids=lambda number: ROWS[number][0]
)
def test_a_run_and_its_resume(tiny_sdxl: Path, cache: Path, tmp_path: Path, number: int) -> None:
    plan = ROWS[number][3]
    kind = plan["adapter.kind"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert fit(make_config(tiny_sdxl, cache, straight, **sections(plan))).finished
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / RESULT[kind].partition("/")[0])
    for step in (2, 3):  # as if it had been killed after its first step
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    assert fit(make_config(tiny_sdxl, cache, resumed, **sections(plan)), resume=True).finished
    one, other = load_file(straight / RESULT[kind]), load_file(resumed / RESULT[kind])
    assert one.keys() == other.keys()
    for tensor, value in one.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, other[tensor]), tensor
    assert len(list((straight / "previews").glob("*/*.png"))) == 3


@pytest.mark.slow
def test_a_resume_forgets_what_the_start_model_left_on_the_device(
    tiny_sdxl: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = next(plan for _, _, _, plan in ROWS if plan.get("offload.weights") == "cpu")
    assert fit(make_config(tiny_sdxl, cache, tmp_path, **sections(plan, steps=2))).finished
    forgotten: list[bool] = []
    real = stream_weights.WeightStreaming.reload

    def reload(streaming: stream_weights.WeightStreaming) -> None:
        real(streaming)
        forgotten.append(all(slot.owner is None for slot in streaming._slots))

    monkeypatch.setattr(stream_weights.WeightStreaming, "reload", reload)
    assert fit(make_config(tiny_sdxl, cache, tmp_path, **sections(plan)), resume=True).finished
    assert forgotten == [True]
