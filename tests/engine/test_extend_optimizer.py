"""The optimizer of `docs/extend/optimizer.md`, from a file outside the package: configs, trainer, plans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.optim import GuardedOptimizer, build_optimizer
from mapo_fast.engine.stream_states import StateStreaming
from mapo_fast.engine.transfers import Transfers
from mapo_fast.planner.trace import record_step
from mapo_fast.run.train import fit
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.optimizers import OPTIMIZERS, Optimizer, register_optimizer
from mapo_fast.settings.schema import Config, OptimConfig
from mapo_fast.util.errors import UserError
from mapo_kernels.objectives import resolve
from tests.pages import imported
from tests.planner.test_recorder import REDUCED
from tests.planner.test_recorder import settings as reduced
from tests.training import make_cache, settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LR, BETAS, DECAY = 2**-7, (7 / 8, 63 / 64), 1 / 8
"""Settings that are exact in fp32, the type of flags and divisors."""


@pytest.fixture
def _lion(tmp_path: Path) -> Iterator[None]:
    with imported("optimizer", tmp_path) as module, patch.dict(OPTIMIZERS):
        module.register()
        yield
    resolve.cache_clear()


def config(model: Path, folder: Path, output: str = "run", **sections: dict[str, Any]) -> Config:
    sections["optim"] = {"name": "lion", "warmup_steps": 0, **sections.get("optim", {})}
    sections["train"] = {"steps": 4, "pairs_per_batch": 1, "evaluate_pairs": 1, **sections.get("train", {})}
    return parse_config(settings(model, folder / "cache", folder / output, **sections))


@pytest.mark.slow
@pytest.mark.usefixtures("_lion")
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"kind": "lora", "rank": 4}},
        {"adapter": {"kind": "full"}, "offload": {"optimizer": "cpu"}},  # and a fused step for it
    ],
    ids=["lora", "full, offloaded states"],
)
def test_it_trains_and_a_resume_goes_on_bit_for_bit(
    tiny_sdxl: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    make_cache(tiny_sdxl, tmp_path)
    lora = sections["adapter"]["kind"] == "lora"
    result = "lora/pytorch_lora_weights" if lora else "unet/diffusion_pytorch_model"

    def weights(output: str) -> dict[str, Tensor]:
        return load_file(tmp_path / output / f"{result}.safetensors")

    assert fit(config(tiny_sdxl, tmp_path, "whole", **sections)).finished
    fit(config(tiny_sdxl, tmp_path, "parts", **sections, train={"steps": 2}))
    half = weights("parts")
    assert fit(config(tiny_sdxl, tmp_path, "parts", **sections), resume=True).finished
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert any(not torch.equal(value, half[name]) for name, value in whole.items())


@pytest.mark.usefixtures("_lion")
@pytest.mark.parametrize("how", ["after backward", "fused", "streamed"])
def test_a_step_is_the_published_formula(how: str) -> None:
    """In fp64, by hand; one tensor's gradient is not finite in one step, which it does not take."""
    random = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, generator=random, dtype=torch.float64) for n in (9000, 3)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    config = OptimConfig(name="lion", lr=LR, betas=BETAS, weight_decay=DECAY)
    built: Any = build_optimizer(config, parameters)
    optimizer: GuardedOptimizer | FusedStep
    if how == "after backward":
        optimizer = GuardedOptimizer(built, parameters, max_grad_norm=0.0, scaler=None)
    else:
        states = StateStreaming(built, Transfers(torch.device("cpu"))) if how == "streamed" else None
        optimizer = FusedStep(built, parameters, max_grad_norm=0.0, states=states)

    expected, averages = [start.clone() for start in starts], [torch.zeros_like(start) for start in starts]
    for step in range(4):
        gradients = [torch.randn(start.shape, generator=random, dtype=torch.float64) for start in starts]
        bad = step == 2
        hook = parameters[1].register_hook(lambda gradient, bad=bad: gradient * (math.inf if bad else 1))
        optimizer.backward(sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True)))  # type: ignore[arg-type]
        optimizer.step()
        hook.remove()
        for i, gradient in enumerate(gradients):
            if bad and (i == 1 or how == "after backward"):
                continue  # the whole step, or the tensor
            direction = (BETAS[0] * averages[i] + (1 - BETAS[0]) * gradient).sign()
            expected[i] = expected[i] - LR * (direction + DECAY * expected[i])
            averages[i] = BETAS[1] * averages[i] + (1 - BETAS[1]) * gradient
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("_lion")
def test_a_plan_knows_its_states() -> None:
    """One number for each trained one."""
    trace = record_step(reduced(optim={"name": "lion"}, train={"fused_step": True}), REDUCED)
    assert (
        trace.row("states").max()
        == trace.row("parameters").max()
        == pytest.approx(4 * trace.trainable, rel=0.1)
    )


@pytest.mark.usefixtures("_lion")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"max_update_rms": 1.0}}, 'use optim.name = "adamw8bit"$'),
        (
            {"optim": {"name": "plain"}, "train": {"fused_step": True}},
            r'^config: train\.fused_step = true and optim\.name = "plain" cannot be combined \(.*\): '
            r'use train\.fused_step = false, or use optim\.name = "adamw"$',
        ),
        (
            {"optim": {"name": "plain"}, "offload": {"optimizer": "cpu"}},
            r'optim\.name = "plain" and offload\.optimizer = "cpu" cannot be combined',
        ),
        ({"optim": {"name": "plain"}, "train": {"shard": True}}, r'optim\.name = "plain"'),
        ({"optim": {"name": "lino"}}, r"optim\.name = 'lino'.*'adafactor', 'lion' or 'plain'"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    register_optimizer("plain", Optimizer(build="somewhere:build"))
    config(tmp_path, tmp_path, train={"fused_step": True})
    config(tmp_path, tmp_path, optim={"name": "plain"})
    with pytest.raises(UserError, match=message) as caught:
        config(tmp_path, tmp_path, **sections)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_lion")
def test_an_entry_that_promises_too_much_is_refused() -> None:
    register_optimizer("sgd", Optimizer(build=f"{__name__}:sgd", fused_step=True))
    register_optimizer("none", Optimizer(build=f"{__name__}:no_optimizer"))
    weights = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match=r"SGD is no .*Fusable, which the entry of 'sgd' promises"):
        build_optimizer(OptimConfig(name="sgd"), weights)
    with pytest.raises(TypeError, match=r"no_optimizer returned no torch\.optim\.Optimizer but list"):
        build_optimizer(OptimConfig(name="none"), weights)


def sgd(parameters: list[torch.nn.Parameter], config: OptimConfig, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=config.lr)


def no_optimizer(parameters: list[torch.nn.Parameter], config: OptimConfig, seed: int) -> Any:
    return parameters
