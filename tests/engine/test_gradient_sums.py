"""Sums of bf16 gradients over many micro-batches: what is kept of them, and what a resumed step adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapo_fast import MaPOLoss
from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.gradient_sums import GradientSums, kept_to_nearest
from mapo_fast.engine.precision import choose_precision
from mapo_fast.settings.load import parse_config
from tests.engine.pair_steps import pair_of_inputs
from tests.unets import SHALLOW, make_unet

CPU = torch.device("cpu")


def noisy_terms(count: int, size: int = 1024) -> Tensor:
    """(count, size) bf16 gradients whose standard deviation is their mean."""
    mean = torch.randn(size, generator=torch.Generator().manual_seed(1)).abs() + 0.1
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    return (mean * (1 + noise)).bfloat16()


def summed(terms: Tensor, *, stochastic: bool) -> Tensor:
    """`.grad` after a backward pass for each of the terms."""
    weight = nn.Parameter(torch.zeros(terms.shape[1], dtype=torch.bfloat16))
    sums = GradientSums([weight], seed=5)
    sums.start(3)
    for term in terms:
        if stochastic:
            with sums.adding():
                (weight * term).sum().backward()
        else:
            (weight * term).sum().backward()
    assert weight.grad is not None
    return weight.grad.double()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "lost"), [(512, 0.01), (2048, 0.4)])
def test_the_sum_of_many_micro_batches_is_kept(count: int, lost: float) -> None:
    terms = noisy_terms(count)
    exact = terms.double().sum(0)
    kept = summed(terms, stochastic=True) / exact
    assert abs(float(kept.mean()) - 1) < 5e-3
    assert float((kept - 1).square().mean().sqrt()) < 2 * count**0.5 * 2**-10
    assert float((summed(terms, stochastic=False) / exact).mean()) < 1 - lost  # what autograd keeps


@pytest.mark.parametrize(("count", "least", "most"), [(1, 1, 1), (128, 0.99, 1.01), (2048, 0.3, 0.6)])
def test_what_rounding_to_nearest_keeps_is_known(count: int, least: float, most: float) -> None:
    assert least <= kept_to_nearest(count) <= most


def test_a_pass_without_a_gradient_leaves_the_sum() -> None:
    first, second = (nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)) for _ in range(2))
    sums = GradientSums([first, second], seed=0)
    for used in ([first, second], [first], [second]):
        with sums.adding():
            sum(p.sum() for p in used).backward()  # type: ignore[union-attr]
    assert first.grad is not None
    assert second.grad is not None
    assert torch.equal(first.grad, torch.full_like(first, 2))
    assert torch.equal(second.grad, torch.full_like(second, 2))


def test_a_pass_that_fails_leaves_the_sum() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    sums = GradientSums([weight], seed=0)
    with sums.adding():
        weight.sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"), sums.adding():
        raise RuntimeError("out of memory")
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


def gradients(kind: str, layout: str, step: int, accumulation: int = 3) -> dict[str, Tensor]:
    config = parse_config(
        {
            "model": {"path": "unused"},
            "data": {"cache": "unused"},
            "train": {
                "output": "unused",
                "precision": "pure_bf16",
                "layout": layout,
                "accumulation": accumulation,
                "pairs_per_batch": 1,
            },
            "adapter": {"kind": kind, "rank": 4},
            "optim": {"name": "adamw8bit"},
        }
    )
    precision = choose_precision(config, CPU)
    unet = make_unet("sdxl", dtype=precision.base, **SHALLOW)
    parts = prepare_unet(unet, config, precision, CPU)
    engine = Engine(config, parts, MaPOLoss(), precision, CPU)
    engine.start(1e-3, step)
    for _ in range(accumulation):
        engine.accumulate(pair_of_inputs(1, torch.bfloat16), 0.25)
    return {n: p.grad for n, p in parts.unet.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("full", "joint"),
        ("lora", "split"),
        pytest.param("full", "sequential", marks=pytest.mark.proof),
        pytest.param("lora", "sequential", marks=pytest.mark.proof),
    ],
)
def test_pure_bf16_rounds_its_sums_stochastically(kind: str, layout: str) -> None:
    """Equal sums at the same step, as after a resume; others at another one; and near what autograd adds."""
    first, again, other = (gradients(kind, layout, step) for step in (0, 0, 1))
    assert first
    assert all(torch.equal(first[n], again[n]) for n in first)
    differ = sum(int((first[n] != other[n]).sum()) for n in first)
    assert differ > 0.05 * sum(g.numel() for g in first.values() if bool(g.any()))
    once: dict[str, Any] = gradients(kind, layout, 0, accumulation=1)
    error = sum(float((first[n].double() - 3 * once[n].double()).square().sum()) for n in first)
    size = sum(float(once[n].double().square().sum()) for n in first)
    assert error**0.5 <= 0.1 * 3 * size**0.5  # sequential adds halves that cancel
