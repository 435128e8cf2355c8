"""The average of the weights: exact whatever their type, through a resume, and without a trace in the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mapo_fast.cli import app
from mapo_fast.models.sampling import Sampling
from mapo_fast.planner.family import Family
from mapo_fast.run.ema import Ema
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.score.sample import open_for_sampling, sample
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config, EmaConfig
from mapo_fast.util.errors import UserError
from tests.training import make_cache, make_config, settings

HALF_LIFE, EVERY = 3.0, 2
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 2}},
    "bf16": {"train": {"precision": "bf16"}},
    "pure bf16": {"train": {"precision": "pure_bf16"}, "optim": {"name": "adamw8bit", "lr": 1e-3}},
    "streamed": {
        "train": {"fused_step": True},
        "optim": {"name": "adamw8bit", "lr": 1e-3},
        "offload": {"weights": "cpu", "optimizer": "cpu"},
    },
    "fused step": {"train": {"fused_step": True}, "optim": {"name": "adamw8bit", "lr": 1e-3}},
}


@pytest.fixture(scope="module")
def make(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    cache = make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))

    def build(output: Path, kind: str, *, ema: bool = True, **train: Any) -> Config:
        sections = dict(KINDS[kind])
        every = {"checkpoint_every": 1, "keep_checkpoints": 9, "evaluate_pairs": 2}
        sections["train"] = {**every, **sections.get("train", {}), **train}
        average = {"half_life": HALF_LIFE, "every": EVERY} if ema else {}
        return make_config(tiny_sdxl, cache, output, ema=average, **sections)

    return build


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_average_of_the_steps_and_changes_no_step(
    make: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    """Recomputed in fp64 from every step's weights."""
    whole, plain, parted = (tmp_path / name for name in ("whole", "plain", "parted"))
    fit(make(whole, kind))
    fit(make(plain, kind, ema=False))
    for steps in (3, 6):
        fit(make(parted, kind, steps=steps), resume=steps > 3)

    first, last = tensors(whole, 1, "average"), tensors(whole, 6, "average")
    start = {name: value.double() for name, value in first.items()}  # untouched before the second step
    assert all(value.dtype == torch.float32 for value in last.values())
    decay, moved = 0.5 ** (EVERY / HALF_LIFE), 0
    for name, expected in start.items():
        for step in (2, 4, 6):
            weights = tensors(whole, step, "model")[name].double()
            expected = decay * expected + (1 - decay) * weights
        assert (last[name] - expected).abs().max() <= 1e-6 * expected.abs().max()
        moved += int((expected != start[name]).any())
    assert moved > len(start) / 3
    for name, value in tensors(plain, 6, "model").items():
        assert torch.equal(value, tensors(whole, 6, "model")[name])
    for file in ("average", "model", "optimizer"):
        one, other = (tensors(run, 6, file) for run in (whole, parted))
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "bf16"])
def test_it_is_evaluated_previewed_and_exported(
    make: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "run"
    config = make(run, kind, evaluate_every=3)
    config = config.model_copy(
        update={"preview": config.preview.model_copy(update={"prompts": ("red",), "steps": 1, "every": 3})}
    )
    fit(config)
    looks = [e for e in read_log(run / "log.jsonl") if e["event"] == "evaluation"]
    assert ["ema" in e for e in looks] == [False, True, True]
    assert 0 < looks[-1]["ema"]["drift"] < looks[-1]["drift"]
    names = [{p.name for p in (run / "previews" / f"step-{n:08d}").iterdir()} for n in (0, 6)]
    assert names == [{"00-red.png"}, {"00-red.png", "00-red-ema.png"}]
    average = tensors(run, 6, "average")
    if kind == "bf16":
        written = load_file(run / "ema" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, average[name]) for name, value in written.items())
    else:
        out = str(tmp_path / "peft")
        done = CliRunner().invoke(app, ["export", str(run), "--ema", "--to", "peft", "--out", out])
        assert done.exit_code == 0, done.output
        written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        sums = [sorted(float(v.sum()) for v in one.values()) for one in (written, average)]
        assert sums[0] == sums[1]
    how = Sampling(steps=1, width=32, height=32)
    assert sample(open_for_sampling(run / "ema"), ["red"], [0], how, tmp_path / "images") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_takes_the_place_of_comes_back_to_the_last_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(50, generator=generator).to(dtype),
        "b": torch.randn(3, 4, generator=generator),
    }
    reloads = []
    parts: Any = SimpleNamespace(weights=SimpleNamespace(reload=lambda: reloads.append(1)))
    ema = Ema(EmaConfig(half_life=5.0, every=1), lambda: weights, parts)
    expected = weights["a"].double()
    for step in range(1, 400):
        weights["a"].add_(torch.randn(50, generator=generator).to(dtype) * 0.01)
        ema.after(step)
        expected = 0.5**0.2 * expected + (1 - 0.5**0.2) * weights["a"].double()
    assert (ema.average["a"] - expected).abs().max() <= 1e-6 * expected.abs().max()
    before = {name: value.clone() for name, value in weights.items()}
    average = {name: value.clone() for name, value in ema.average.items()}
    with suppress(KeyboardInterrupt), ema.in_place():
        assert torch.equal(weights["a"], average["a"].to(dtype))
        raise KeyboardInterrupt
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert all(torch.equal(ema.average[name], value) for name, value in average.items())
    assert len(reloads) == 2


def test_split_weights_are_refused_by_name(tmp_path: Path) -> None:
    table = settings(
        tmp_path, tmp_path, tmp_path, train={"shard": True}, optim={"name": "adamw"}, ema={"half_life": 5.0}
    )
    with pytest.raises(UserError, match=r"train\.shard.*ema\.half_life"):
        parse_config(table)


@pytest.mark.parametrize(("precision", "itemsize"), [("bf16", 4), ("pure_bf16", 2)])
def test_a_plan_counts_its_ram_and_its_transfers(precision: str, itemsize: int) -> None:
    table = settings(Path("m"), Path("c"), Path("o"), train={"precision": precision})
    family: Any = SimpleNamespace(card=SimpleNamespace(rates=SimpleNamespace(store=2e9)))
    trace: Any = SimpleNamespace(trainable=10**9)
    family.config = parse_config({**table, "optim": {"name": "adamw8bit"}})
    assert Family._average(family, trace) == (0, 0.0)
    family.config = parse_config({**table, "optim": {"name": "adamw8bit"}, "ema": {"half_life": 50.0}})
    ram, ms = Family._average(family, trace)
    assert ram == 10**9 * (4 + itemsize)
    assert math.isclose(ms, 1e3 * itemsize * 1e9 / 2e9 / 10)
