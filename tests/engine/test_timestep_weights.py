"""Weights by timestep: the published formula, tables, and gradients of every kind of objective in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.step import PairInputs
from mapo_fast.engine.timestep_weights import timestep_weights
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config, TrainConfig
from mapo_fast.util.errors import UserError
from mapo_kernels.objectives import OBJECTIVES
from tests.engine.pair_steps import PAIRS, pair_of_inputs
from tests.engine.test_engine import CPU, FP64
from tests.unets import make_unet

SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = torch.linspace(0.1, 2.0, 1000, dtype=torch.float64)


def settings(objective: str = "mapo", layout: str = "joint", **train: Any) -> Config:
    fixed = {"output": "unused", "precision": "fp32", "layout": layout, "pairs_per_batch": PAIRS}
    return parse_config(
        {
            "model": {"path": "unused"},
            "data": {"cache": "unused"},
            "objective": {"name": objective},
            "train": {**fixed, "gradient_checkpointing": layout == "split", **train},
            "optim": {"name": "adamw", "max_grad_norm": 0.0},
            "adapter": {"kind": "full"},
        }
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "zero terminal snr"])
def test_min_snr_is_the_published_formula(kind: str, gamma: float) -> None:
    zero = kind == "zero terminal snr"
    prediction = {"prediction_type": "epsilon" if kind == "epsilon" else "v_prediction"}
    diffusion = Diffusion({**SCHEDULE, **prediction, "rescale_betas_zero_snr": zero})
    config = settings(timestep_weights="min_snr", min_snr_gamma=gamma).train
    weights = timestep_weights(config, diffusion, CPU)
    assert weights is not None
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000).double() ** 2
    snr = (p := torch.cumprod(1 - betas, 0)) / (1 - p)
    if zero:
        root = p.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        snr = root**2 / (1 - root**2)
    expected = snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)
    assert torch.isfinite(weights).all()
    assert torch.allclose(weights.double(), expected, rtol=2e-3, atol=1e-6)  # diffusers' schedule is in fp32
    assert (weights <= 1).all()


def test_a_table_is_of_equal_parts_of_the_timesteps() -> None:
    diffusion = Diffusion(SCHEDULE)
    weights = timestep_weights(settings(timestep_weights=[0.5, 1.0, 2.0]).train, diffusion, CPU)
    assert weights is not None
    assert [float(weights[t]) for t in (0, 333, 334, 666, 667, 999)] == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]
    assert timestep_weights(TrainConfig(output="x"), diffusion, CPU) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("table", [[], [-1.0, 1.0], [0.0, 0.0], [1.0] * 1001, ["a"], "minsnr"])
def test_a_wrong_table_is_named(table: Any) -> None:
    with pytest.raises(UserError, match=r"train\.timestep_weights"):
        settings(timestep_weights=table)


def gradients(config: Config, inputs: PairInputs, weights: Tensor | None, given: dict[str, Any]) -> Tensor:
    """All gradients of one micro-batch, in one tensor."""
    parts = prepare_unet(make_unet("sdxl"), config, FP64, CPU)
    engine = Engine(config, parts, build_loss(config.objective, 1000), FP64, CPU, weights=weights)
    engine.start(1e-3)
    engine.accumulate(inputs, 1.0, **given)
    return torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None])


def of_pair(inputs: PairInputs, pair: int) -> PairInputs:
    return PairInputs(*(torch.cat([half[pair : pair + 1] for half in x.chunk(2)]) for x in inputs))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "split", "sequential"])
@pytest.mark.parametrize("objective", ["mapo", "dpo", "smpo", "orpo", "sft"])
def test_each_pairs_gradient_has_its_weight(objective: str, layout: str) -> None:
    config, inputs = settings(objective, layout), pair_of_inputs()
    known = OBJECTIVES[config.objective.kernel]
    errors = torch.tensor([1.2, 1.3, 0.9, 1.1, 1.4, 1.0], dtype=torch.float64) if known.reference else None
    labels = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64) if known.labels == "required" else None
    known_of_all = {"reference_errors": errors, "labels": labels}
    whole = gradients(config, inputs, TABLE, known_of_all)
    expected = torch.zeros_like(whole)
    for pair in range(PAIRS):
        given = {
            "reference_errors": None if errors is None else errors.view(2, PAIRS)[:, pair].clone(),
            "labels": None if labels is None else labels[pair : pair + 1],
        }
        weight = TABLE[inputs.timesteps[pair]]
        expected += weight / PAIRS * gradients(config, of_pair(inputs, pair), None, given)
    assert (whole - expected).norm() <= 1e-9 * expected.norm()
    assert (
        whole - gradients(config, inputs, None, {"reference_errors": errors, "labels": labels})
    ).norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "sequential"])
def test_each_single_images_gradient_has_its_weight(layout: str) -> None:
    """KTO's baseline is of all samples, so a power of two on all of them shows it."""
    config, inputs = settings("kto", layout), pair_of_inputs()
    inputs = inputs._replace(timesteps=torch.tensor([3, 200, 999, 471, 640, 88]))
    errors = torch.tensor([1.2, 1.3, 0.9, 1.1, 1.4, 1.0], dtype=torch.float64)
    given = {"reference_errors": errors, "labels": torch.tensor([True, False, True, True, False, False])}
    whole = gradients(config, inputs, torch.full((1000,), 0.25, dtype=torch.float64), given)
    assert torch.equal(whole, 0.25 * gradients(config, inputs, None, given))
    one = torch.zeros(1000, dtype=torch.float64)
    one[471] = 1.0
    each = [gradients(config, inputs, one.roll(int(t) - 471), given) for t in inputs.timesteps]
    total = sum(float(TABLE[t]) * g for t, g in zip(inputs.timesteps, each, strict=True))
    assert (gradients(config, inputs, TABLE, given) - total).norm() <= 1e-9 * whole.norm()
