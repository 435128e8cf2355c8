"""Every objective trains and resumes in the trainer; precomputed errors survive what a run goes through."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mapo_fast.data.cache import PairCache
from mapo_fast.engine import reference
from mapo_fast.engine.engine import Engine
from mapo_fast.run.feed import Feed
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.run.trainer import Trainer
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.signals import STOP_FILE
from mapo_kernels import OBJECTIVES
from mapo_kernels.objectives import objective_names
from tests.tiers import some_of
from tests.training import make_cache, make_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EVERY = objective_names()
NAMES = [name for name in EVERY if name != "kto"]  # which learns from single images: test_kto
ADAPTERS = {"lora": {"kind": "lora", "rank": 4}, "full": {"kind": "full"}}
RESULT = {"full": "unet/diffusion_pytorch_model.safetensors", "lora": "lora/pytorch_lora_weights.safetensors"}
RUNS = [(name, kind, "auto") for name in NAMES for kind in ADAPTERS if (name == "dpo") or (kind == "lora")]
RUNS += [("dpo", "full", "copy"), ("dpo", "lora", "precomputed")]
FIRST_OF_A_NEED = ("mapo", "npo", "dpo", "smpo")
LIKE_OTHERS = [run for run in RUNS if run[0] not in FIRST_OF_A_NEED]
"""Runs of objectives that need what an earlier one does; the formulas are tested with the kernels."""
SHORT = {
    "steps": 2,
    "checkpoint_every": 1,
    "log_every": 1,
    "evaluate_pairs": 1,
    "layout": "joint",
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"), labelled=True)


@pytest.fixture
def make(tiny_sdxl: Path, cache: Path, tmp_path: Path) -> Callable[..., Config]:
    def build(
        objective: str, kind: str = "full", source: str = "auto", /, output: str = "run", **steps: Any
    ) -> Config:
        return make_config(
            tiny_sdxl,
            cache,
            tmp_path / output,
            objective={"name": objective, "reference": source},
            adapter=ADAPTERS[kind],
            train={**SHORT, **steps},
            optim={"lr": 1e-3, "warmup_steps": 0},
            speed={"fused_ops": False},  # for these few numbers plain operators are faster
        )

    return build


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor | None]]:
    """The noisy latents and soft labels that the engine is given, in order."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    real = Engine.accumulate

    def accumulate(engine: Engine, inputs: Any, *args: Any, **given: Any) -> Any:
        seen.append((inputs.noisy, given["labels"]))
        return real(engine, inputs, *args, **given)

    monkeypatch.setattr(Engine, "accumulate", accumulate)
    return seen


def test_all_of_the_kernels_objectives_have_a_name() -> None:
    plain = {name for name in OBJECTIVES if not name.startswith("mapo_")}
    assert set(EVERY) == plain | {"mapo", "npo"}


FIRST: list[Tensor] = []


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "kind", "source"), some_of(RUNS, LIKE_OTHERS))
def test_a_run_and_its_resume(
    make: Callable[..., Config],
    tmp_path: Path,
    draws: list[tuple[Tensor, Tensor | None]],
    objective: str,
    kind: str,
    source: str,
) -> None:
    """The second step is taken twice: at once, and from the first step's checkpoint."""
    config = make(objective, kind, source)
    assert fit(config).finished
    once = load_file(tmp_path / "run" / RESULT[kind])
    for done in (Path(RESULT[kind]).parent, "checkpoints/step-00000002"):
        shutil.rmtree(tmp_path / "run" / done)
    assert fit(config, resume=True).finished
    again = load_file(tmp_path / "run" / RESULT[kind])
    assert all(torch.equal(again[name], tensor) for name, tensor in once.items())
    noisy = [latents for latents, _ in draws]
    FIRST[:] = FIRST or noisy
    assert len(noisy) == 3
    assert all(torch.equal(a, b) for a, b in zip(noisy, FIRST, strict=True)), "draws of every objective"
    assert torch.equal(noisy[1], noisy[2])
    for _, labels in draws:
        assert (labels is not None) == (objective == "smpo")
        assert labels is None or (labels.shape == (2,) and (labels >= 0.6).all())
    entries = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in entries] == [1, 2]
    assert all(torch.isfinite(torch.tensor([e["loss"], e["grad_norm"], e["logits"]])).all() for e in entries)
    if OBJECTIVES[config.objective.kernel].reference:
        assert abs(entries[0]["logits"]) < 1e-2 * abs(entries[1]["logits"]), "no margin in the first step"


@pytest.mark.slow
def test_a_pass_that_was_stopped_goes_on_and_a_longer_run_adds_to_it(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART", 3)
    straight = make("dpo", output="straight", steps=4, accumulation=2)
    assert fit(straight).finished
    made: list[int] = []
    real = reference.StartModel.errors

    def errors(start: Any, *args: Any) -> Tensor:
        made.append(1)
        if len(made) == 2:
            (tmp_path / "run" / STOP_FILE).touch()
        return real(start, *args)

    monkeypatch.setattr(reference.StartModel, "errors", errors)
    assert not fit(make("dpo", accumulation=2)).finished
    assert len(made) == 2
    assert fit(make("dpo", accumulation=2), resume=True).finished
    assert len(made) == 4
    assert fit(make("dpo", steps=4, accumulation=2), resume=True).finished
    assert len(made) == 8
    one, other = (load_file(tmp_path / run / RESULT["full"]) for run in ("straight", "run"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [False, True])
def test_the_pass_reads_ahead_as_training_does(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, prefetch: bool
) -> None:
    ahead: list[bool] = []
    real = Feed.inputs

    def inputs(feed: Feed, *args: Any) -> Any:
        ahead.append(threading.current_thread() is not threading.main_thread())
        return real(feed, *args)

    monkeypatch.setattr(Feed, "inputs", inputs)
    monkeypatch.setattr(Trainer, "healthy", lambda self, **_: True)  # looks at the first pairs again
    config = make("dpo", steps=3)
    speed = config.speed.model_copy(update={"prefetch": prefetch})
    assert fit(config.model_copy(update={"speed": speed})).finished
    assert ahead[:6] == [prefetch] * 6, "three before the first step and three in steps"


@pytest.mark.slow
def test_soft_labels_are_in_the_cache_or_missed(
    make: Callable[..., Config], tiny_sdxl: Path, cache: Path, tmp_path: Path
) -> None:
    opened = PairCache.open(cache)
    rows = opened.rows(opened.train[:3])
    wanted = [0.6 + 0.4 * int(row.prompt.rpartition(" ")[2]) / 24 for row in rows]
    torch.testing.assert_close(opened.labels(opened.train[:3]), torch.tensor(wanted))
    unlabelled = make_cache(tiny_sdxl, tmp_path)
    config = make_config(
        tiny_sdxl, unlabelled, tmp_path / "run", objective={"name": "smpo"}, adapter=ADAPTERS["lora"]
    )
    with pytest.raises(UserError, match="'smpo' needs a soft label for every pair"):
        fit(config)
    assert not (tmp_path / "run").exists()
