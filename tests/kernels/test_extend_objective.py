"""The objective of `docs/extend/objective.md`, from a file outside the package, in every implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapo_kernels import OBJECTIVES, PairedLoss, paired_loss, paired_loss_from_errors
from mapo_kernels.objectives import Objective, Setting, objective_names, register_objective, resolve
from tests.kernels.pairs import gradient, make
from tests.pages import imported

SETTINGS = {"beta": 2.0, "wrong": 0.2}
EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture
def objective(tmp_path: Path) -> Iterator[str]:
    """Registered for one test."""
    with imported("objective", tmp_path) as module, patch.dict(OBJECTIVES):
        module.register()
        yield "robust_dpo"
    resolve.cache_clear()


def by_hand(e_w: Tensor, e_l: Tensor, r_w: Tensor, r_l: Tensor) -> Tensor:
    """The published formula, one loss per pair."""
    beta, wrong = SETTINGS.values()
    u = beta / 2 * ((r_w - e_w) - (r_l - e_l))
    return -((1 - wrong) * F.logsigmoid(u) - wrong * F.logsigmoid(-u)) / (1 - 2 * wrong)


def errors(prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (prediction - target).square().flatten(1).mean(1).chunk(2)


def test_value_and_gradient_are_the_formula_s(device: str, objective: str) -> None:
    prediction, target = make((6, 2, 3, 5), device, torch.float64, gap=1.5)
    reference = target + torch.randn_like(target)
    out = paired_loss(prediction, target, objective=objective, reference_prediction=reference, **SETTINGS)
    given = errors(reference, target)
    want = by_hand(*errors(prediction, target), *given).mean()
    torch.testing.assert_close(out.loss, want, **EXACT)
    found = [*gradient(out, prediction), *torch.autograd.grad(want, prediction)]
    torch.testing.assert_close(*found, **EXACT)
    again = paired_loss_from_errors(
        out.chosen_error, out.rejected_error, objective=objective, reference_errors=given, **SETTINGS
    )
    torch.testing.assert_close(again.loss, out.loss, **EXACT)
    assert torch.equal(out.correct, out.logits > 0)
    assert {True, False} == {*out.correct.tolist()}


def test_gradcheck_through_the_kernel(device: str, objective: str) -> None:
    prediction, target = make((2, 1, 1, 2), device, torch.float64, gap=1.5)

    def loss(prediction: Tensor) -> Tensor:
        out = paired_loss(
            prediction, target, objective=objective, reference_prediction=target + 1.0, **SETTINGS
        )
        return out.loss

    assert torch.autograd.gradcheck(loss, (prediction,))


def test_swapped_halves_keep_the_names_of_the_data(device: str, objective: str) -> None:
    """What is trained for is the rejected half; errors and their gradients stand where the data put them."""
    register_objective("turned", dataclasses.replace(OBJECTIVES[objective], swapped=True))
    prediction, target = make((6, 2, 3, 5), device, torch.float64)
    halves = torch.rand(2, 3, device=device, dtype=torch.float64)

    def run(name: str, p: Tensor, t: Tensor, r: Tensor) -> PairedLoss:
        return paired_loss(p, t, objective=name, reference_errors=(r[0], r[1]), **SETTINGS)

    out = run("turned", prediction, target, halves)
    turned = run(objective, prediction.roll(3, 0), target.roll(3, 0), halves.flip(0))
    torch.testing.assert_close(out.loss, turned.loss, **EXACT)
    torch.testing.assert_close(out.logits, turned.logits, **EXACT)
    torch.testing.assert_close(out.chosen_error, turned.rejected_error, **EXACT)
    torch.testing.assert_close(*gradient(out, prediction), *gradient(turned, prediction), **EXACT)


def test_it_is_one_of_the_objectives_and_needs_what_it_says(objective: str) -> None:
    assert objective in objective_names()
    x = torch.ones(2)
    for settings, message in (
        ({}, "reference_errors: 'robust_dpo' compares with a reference model"),
        ({"wrong": 0.5}, "wrong: 0.5 must be between 0.0 and 0.5"),
        ({"labels": x, "reference_errors": (x, x)}, "labels: 'robust_dpo' has no soft labels"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_loss_from_errors(x, x, objective=objective, **settings)  # type: ignore[arg-type]


GOOD: dict[str, Any] = {"terms": "somewhere:TERMS", "settings": {"beta": Setting(1.0)}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Mine", {}, "a name is lower-case letters"),
        ("dpo", {}, "registered already"),
        ("mapo", {}, "registered already"),
        ("mine", {"named": {"name": "other"}}, "leave `named` out"),
        ("mine", {"terms": "no_colon"}, "terms = 'no_colon' is not written as 'module:NAME'"),
        ("mine", {"labels": "maybe"}, "labels = 'maybe' is unknown"),
        ("mine", {"baseline": True}, "only terms of single samples"),
        ("mine", {"single": "a:b", "labels": "optional"}, "single samples have no soft labels"),
        ("mine", {"settings": dict.fromkeys("abcd", Setting(1.0))}, "3 settings at most"),
        ("mine", {"settings": {"form": Setting(1.0)}}, "'form' cannot be the name of a setting"),
        ("mine", {"settings": {"beta": Setting(1.0, role="schedule")}}, "the role 'schedule' of 'beta'"),
        ("mine", {"settings": {"beta": Setting(2.0, high=1.0)}}, "the default of 'beta' is not between"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    before = dict(OBJECTIVES)
    with patch.dict(OBJECTIVES):
        with pytest.raises(ValueError, match=message):
            register_objective(name, Objective(**{**GOOD, **changes}))
        assert before == OBJECTIVES
        register_objective("mine", Objective(**GOOD))
        with pytest.raises(TypeError, match="register an Objective, not dict"):
            register_objective("other", GOOD)  # type: ignore[arg-type]
