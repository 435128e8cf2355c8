"""`MaPOLoss` and `SFTLoss`: settings reach the operator, bad ones are refused, and torch alone is enough."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_fast import MaPOLoss, SFTLoss
from mapo_kernels import paired_loss
from mapo_kernels.reference import paired_loss_reference
from tests.kernels.pairs import tensors

ROOT = Path(__file__).parents[2]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.randn(4, 4, 8, 8)
    return (target + 0.1 * torch.randn_like(target)).requires_grad_(), target


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (MaPOLoss(), {"objective": "mapo_code"}),
        (
            MaPOLoss(form="code", beta=0.3, snr=0.7, num_train_timesteps=50),
            {"objective": "mapo_code", "beta": 0.3, "snr": 0.7, "num_train_timesteps": 50},
        ),
        (MaPOLoss("paper", beta=8), {"objective": "mapo_paper_power", "beta": 8}),
        (MaPOLoss(form="paper", reading="scale", beta=64.0), {"objective": "mapo_paper_scale", "beta": 64.0}),
        (MaPOLoss(reduction="none"), {"objective": "mapo_code", "reduction": "none"}),
        (SFTLoss(), {"objective": "sft"}),
        (SFTLoss(reduction="none"), {"objective": "sft", "reduction": "none"}),
    ],
)
def test_modules_are_the_operator(module: Any, settings: dict[str, Any]) -> None:
    prediction, target = batch()
    weights, mask = torch.rand(2), torch.rand(2, 1, 8, 8)
    got = module(prediction, target, weights=weights, mask=mask)
    want = paired_loss(prediction, target, weights=weights, mask=mask, **settings)
    truth = paired_loss_reference(prediction, target, weights=weights, mask=mask, **settings)
    assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    assert list(module.state_dict()) == []


def test_zero_margin_pull_of_the_two_forms() -> None:
    """At zero margin and small errors the code form pulls with β·½·T·λ/2 = 12.5, the paper form with 1/4."""
    for module, pull in ((MaPOLoss(), 12.5), (MaPOLoss("paper", beta=8.0), 0.25), (SFTLoss(), 0.0)):
        e_w = torch.tensor([1e-6], dtype=torch.float64, requires_grad=True)
        e_l = e_w.detach().clone().requires_grad_()
        d_w, d_l = torch.autograd.grad(module.from_errors(e_w, e_l).loss, (e_w, e_l))
        assert d_w.item() == pytest.approx(1 + pull, rel=1e-4)
        assert d_l.item() == pytest.approx(-pull, rel=1e-4)


@pytest.mark.parametrize("module", [MaPOLoss(), MaPOLoss("paper", "scale", 8.0, reduction="none"), SFTLoss()])
def test_from_errors_agrees_with_forward(module: Any) -> None:
    prediction, target = batch()
    errors = (prediction - target).square().flatten(1).mean(1)
    whole = module(prediction, target)
    parts = module.from_errors(*errors.chunk(2))
    again = module.from_errors(whole.chosen_error, whole.rejected_error)
    assert torch.equal(again.logits, whole.logits)
    assert torch.equal(again.loss, whole.loss)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-4, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(x.loss.sum(), prediction) for x in (parts, whole))
    assert (a - b).norm() <= 1e-3 * b.norm()
    weighted = module.from_errors(whole.chosen_error, whole.rejected_error, weights=torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(weighted.loss, 2 * whole.loss.detach())


def test_from_errors_keeps_each_gradient_in_its_dtype() -> None:
    e_w = torch.rand(3, dtype=torch.bfloat16, requires_grad=True)
    e_l = torch.rand(3, dtype=torch.float64, requires_grad=True)
    out = MaPOLoss().from_errors(e_w, e_l)
    assert out.loss.dtype == torch.float64
    assert [g.dtype for g in torch.autograd.grad(out.loss, (e_w, e_l))] == [torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"form": "dpo"}, ValueError, "form: 'dpo' is unknown; choose one of 'code', 'paper'"),
        ({"reading": "sum"}, ValueError, "reading: 'sum' is unknown"),
        ({"reduction": "sum"}, ValueError, "reduction: 'sum' is unknown"),
        ({"beta": 0}, ValueError, "beta: 0 must be positive"),
        ({"beta": "0.1"}, TypeError, "beta: '0.1' is not a number"),
        ({"snr": float("nan")}, ValueError, "snr: nan must be positive"),
        ({"num_train_timesteps": -1}, ValueError, "num_train_timesteps: -1 must be positive"),
        ({"num_train_timesteps": True}, TypeError, "num_train_timesteps: True is not a number"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaPOLoss(**settings)


def test_repr_shows_the_settings_in_use() -> None:
    assert (
        repr(MaPOLoss())
        == "MaPOLoss(form='code', beta=0.1, snr=0.5, num_train_timesteps=1000, reduction='mean')"
    )
    assert (
        repr(MaPOLoss("paper", beta=8)) == "MaPOLoss(form='paper', reading='power', beta=8, reduction='mean')"
    )
    assert repr(SFTLoss("none")) == "SFTLoss(reduction='none')"


def test_one_full_graph() -> None:
    torch._dynamo.reset()
    prediction, target = batch()
    module = MaPOLoss()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prediction, target).logits, module(prediction, target).logits)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now fails, as where it is not installed
import torch
from mapo_fast import MaPOLoss
from mapo_kernels import backend
prediction = torch.randn(4, 4, 8, 8, requires_grad=True)
out = MaPOLoss()(prediction, torch.randn(4, 4, 8, 8))
out.loss.backward()
assert prediction.grad.isfinite().all()
assert backend("cuda") == ("eager", "Triton is not installed"), backend("cuda")
heavy = {"diffusers", "transformers", "pydantic", "peft"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.slow
def test_works_without_triton_and_the_trainer() -> None:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    subprocess.run([sys.executable, "-c", path + WITHOUT_TRITON], check=True, cwd=ROOT, timeout=120)
