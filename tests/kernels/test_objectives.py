"""The family of objectives: values by hand, slopes, reference models, soft labels, settings.

This file runs in every implementation: see conftest.py. test_paired_loss.py tests what all of them share.
"""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_kernels import OBJECTIVES, backend, paired_loss, paired_loss_from_errors
from mapo_kernels.ops import _pair_kernels as kernels
from mapo_kernels.reference import paired_loss_reference
from tests.kernels.pairs import Counting, check, gradient, make, needs, tensors
from tests.saved import saved_bytes

FAMILY = [name for name in OBJECTIVES if not name.startswith("mapo") and name != "sft"]
"""All but MaPO's forms and their control, which test_paired_loss.py runs."""
REFERENCED = [name for name, known in OBJECTIVES.items() if known.reference]
LABELLED = [name for name, known in OBJECTIVES.items() if known.labels != "refused"]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


def column(errors: Tensor) -> Tensor:
    """A prediction of one element a sample that has these errors against 0."""
    return errors.sqrt()[:, None].requires_grad_()


# --- Values and slopes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", FAMILY)
def test_matches_fp64(device: str, objective: str, dtype: torch.dtype) -> None:
    check(*make((6, 4, 9, 9), device, dtype), objective=objective, **needs(objective, 3, device))


@pytest.mark.parametrize("objective", FAMILY)
def test_weights_mask_and_one_loss_per_pair(device: str, objective: str) -> None:
    weights, mask = torch.tensor([0.0, 0.5, 3.0], device=device), torch.rand(3, 1, 5, 7, device=device)
    check(*make((6, 3, 5, 7), device), objective=objective, weights=weights, mask=mask, reduction="none",
          **needs(objective, 3, device))  # fmt: skip


def log_loss(z: float) -> float:
    return math.log1p(math.exp(-z))


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


E_W, E_L, R_W, R_L = 0.25, 0.5, 0.375, 0.4375  # exact in fp16
M = (R_W - E_W) - (R_L - E_L)  # 0.1875
BY_HAND: dict[str, tuple[dict[str, Any], float, float]] = {  # settings, loss, logit
    "dpo": ({"beta": 4.0}, log_loss(2 * M), 2 * M),
    "smpo": ({"beta": 4.0, "labels": [0.75]}, log_loss(10 * M), 10 * M),
    "ipo": ({"beta": 4.0}, (M - 0.125) ** 2, M),
    "hinge": ({"beta": 4.0}, 1 - 4 * M, 4 * M),
    "kto": (
        {"beta": 4.0, "desirable_weight": 1.5, "undesirable_weight": 0.5, "kto_baseline": 0.0625},
        0.5 * (1.5 * (1 - sigma(4 * (0.125 - 0.0625))) + 0.5 * (1 - sigma(-4 * (-0.0625 - 0.0625)))),
        4 * M,
    ),
    "dmpo": (
        {"beta": 4.0, "alpha": 0.25},
        sigma(2 * M) * math.log(sigma(2 * M) / 0.75) + sigma(-2 * M) * math.log(sigma(-2 * M) / 0.25),
        2 * M,
    ),
    "linear_dpo": ({"beta": 4.0, "eta": 0.125}, (0.5 - 0.8 * M) * (E_W - E_L), 0.8 * M),
    "npo": ({"beta": 4.0}, log_loss(-2 * M), -2 * M),
    "orpo": ({"beta": 0.5}, E_W + 0.5 * log_loss(E_L - E_W), E_L - E_W),
    "simpo": ({"beta": 4.0, "gamma": 0.5}, log_loss(0.5), 0.5),
    "cpo": ({"beta": 4.0, "gamma": 0.25}, E_W + log_loss(0.75), 0.75),
}


@pytest.mark.parametrize("objective", FAMILY)
def test_values_by_hand(device: str, objective: str) -> None:
    settings, loss, logit = BY_HAND[objective]
    settings = {k: torch.tensor(v, device=device) if k in ("labels", "kto_baseline") else v
                for k, v in settings.items()}  # fmt: skip
    if objective in REFERENCED:
        settings["reference_errors"] = torch.tensor([R_W, R_L], device=device)
    errors = torch.tensor([E_W, E_L], device=device)
    out = paired_loss(column(errors), torch.zeros(2, 1, device=device), objective=objective, **settings)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    assert out.logits.item() == pytest.approx(logit, rel=1e-6)
    assert out.correct.item() == (logit > 0)
    given = paired_loss_from_errors(*errors.chunk(2), objective=objective, **settings)
    assert given.loss.item() == pytest.approx(loss, rel=1e-6)


MILD = {"beta": 2.0, "snr": 0.7, "num_train_timesteps": 3.0, "alpha": 0.2, "eta": 0.1, "gamma": 0.3,
        "desirable_weight": 1.5, "undesirable_weight": 0.6}  # fmt: skip
"""Settings at which no sigmoid saturates."""


def mild(objective: str) -> dict[str, float]:
    return {name: MILD[name] for name in OBJECTIVES[objective].settings}


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("objective", FAMILY)
def test_gradcheck_from_errors(device: str, objective: str, labelled: bool) -> None:
    """The written-out slopes; linear_dpo, whose strength counts as constant, where it is constant."""
    if labelled and objective not in LABELLED:
        labelled = False
    far = 10.0 if objective == "linear_dpo" else 1.0
    e_w = (far * torch.tensor([0.2, 1.0, 3.0, 0.3], device=device)).double().requires_grad_()
    e_l = (far * torch.tensor([0.9, 0.1, 1.5, 1.01], device=device)).double().requires_grad_()
    extra = needs(objective, 4, device) | mild(objective)
    if labelled:
        extra["labels"] = torch.tensor([0.0, 0.3, 0.9, 1.0], device=device)

    def loss(e_w: Tensor, e_l: Tensor) -> Tensor:
        return paired_loss_from_errors(e_w, e_l, objective=objective, reduction="none", **extra).loss

    assert torch.autograd.gradcheck(loss, (e_w, e_l))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_gradcheck_through_the_kernel(device: str, objective: str) -> None:
    prediction, target = make((2, 1, 1, 2), device, torch.float64, gap=1.5)
    reference = target + 1.0
    extra = needs(objective, 1, device) | mild(objective)
    del extra["reference_errors"]

    def loss(prediction: Tensor) -> Tensor:
        return paired_loss(
            prediction, target, objective=objective, reference_prediction=reference, **extra
        ).loss

    assert torch.autograd.gradcheck(loss, (prediction,))


@pytest.mark.parametrize("objective", [*OBJECTIVES])
def test_gradcheck_of_the_definition(objective: str) -> None:
    prediction, target = make((4, 2), "cpu", torch.float64, gap=3.0 if objective == "linear_dpo" else 1.0)
    extra = needs(objective, 2, "cpu") | mild(objective)
    if objective == "linear_dpo":  # in its constant part
        extra["beta"] = 1000.0

    def loss(prediction: Tensor) -> Tensor:
        return paired_loss_reference(prediction, target, objective=objective, **extra).loss

    assert torch.autograd.gradcheck(loss, (prediction,))


@pytest.mark.parametrize("objective", FAMILY)
def test_from_errors_is_the_kernel_on_its_errors(device: str, objective: str) -> None:
    p, t = make((6, 3, 5, 7), device)
    extra = needs(objective, 3, device)
    out = paired_loss(p, t, objective=objective, **extra)
    again = paired_loss_from_errors(out.chosen_error, out.rejected_error, objective=objective, **extra)
    for a, b in zip(tensors(again), tensors(out), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=0)


# --- Exactness and extremes ---


@pytest.mark.parametrize(("objective", "factor"), [("dpo", 2500), ("hinge", 5000), ("ipo", 1)])
def test_logits_to_the_last_digit(device: str, objective: str, factor: int) -> None:
    """Four nearly equal errors: in fp32 the difference of differences would keep two digits or none."""
    near = 0.01 * (1 + 1e-6 * torch.randn(4, 32, device=device))
    out = paired_loss_from_errors(
        near[0], near[1], objective=objective, reference_errors=(near[2], near[3]), reduction="none"
    )
    exact = [
        float(factor * ((Fraction(c) - Fraction(a)) - (Fraction(d) - Fraction(b))))
        for a, b, c, d in near.T.tolist()
    ]
    want = torch.tensor(exact, dtype=torch.float64)
    assert ((out.logits.cpu().double() - want).abs() <= 2**-23 * want.abs() + 1e-30).all()


@pytest.mark.parametrize("objective", FAMILY)
def test_huge_margins_are_finite(device: str, objective: str) -> None:
    """β = 5000 and errors of 1e15 give |u| = 2.5e18; exp of it must not appear."""
    huge = torch.tensor([2e3, 1e6, 1e15], device=device)
    small = torch.full_like(huge, 0.1)
    prediction = column(torch.cat([huge, small, huge, small, huge, huge]))
    extra = needs(objective, 9, device)
    out = paired_loss(prediction, torch.zeros(18, 1, device=device), objective=objective, **extra)
    assert all(torch.isfinite(x).all() for x in tensors(out))
    assert torch.isfinite(gradient(out, prediction)[0]).all()


def test_a_saturated_logit_is_linear_or_zero(device: str) -> None:
    """Far on the wrong side dpo's loss is −u and its slope β/2; far on the right side both are 0."""
    e = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device).double().requires_grad_()
    zero = torch.zeros(2, device=device)
    out = paired_loss_from_errors(
        e[0], e[1], objective="dpo", reference_errors=(zero, zero), reduction="none"
    )
    assert out.loss.tolist() == [2500.0, 0.0]
    (slope,) = torch.autograd.grad(out.loss.sum(), e)
    assert slope.tolist() == [[2500.0, 0.0], [-2500.0, 0.0]]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("where", ["chosen", "rejected", "reference"])
@pytest.mark.parametrize("objective", FAMILY)
def test_nan_and_inf_stay_in_their_pair_and_show(device: str, objective: str, where: str) -> None:
    """Pair 1 gets a NaN, pair 2 an Inf."""
    if where == "reference" and objective not in REFERENCED:
        where = "rejected"
    p, t = make((8, 2, 3, 3), device)
    extra = needs(objective, 4, device)
    clean = paired_loss(p, t, objective=objective, reduction="none", **extra)
    (clean_grad,) = gradient(clean, p, grad=torch.ones_like(clean.loss))
    bad = p.detach().clone()
    broken = torch.tensor([math.nan, math.inf], device=device)
    if where == "reference":
        r_w, r_l = extra["reference_errors"]
        extra["reference_errors"] = (r_w, torch.cat([r_l[:1], broken, r_l[3:]]))
    else:
        bad[[1, 2] if where == "chosen" else [5, 6], 1, 2, 0] = broken
    bad.requires_grad_()
    out = paired_loss(bad, t, objective=objective, reduction="none", **extra)
    (grad,) = gradient(out, bad, grad=torch.ones_like(out.loss))
    for a, b in zip(tensors(out), tensors(clean), strict=True):
        assert torch.equal(a[[0, 3]], b[[0, 3]])
    assert torch.equal(grad[[0, 3, 4, 7]], clean_grad[[0, 3, 4, 7]])
    assert not torch.isfinite(out.logits[1:3]).any()
    assert not torch.isfinite(out.loss[1:3]).any()
    assert not torch.isfinite(grad[[1, 2, 5, 6]]).any()


# --- Reference models ---


@pytest.mark.parametrize("objective", REFERENCED)
def test_reference_prediction(device: str, objective: str) -> None:
    p, t = make((6, 4, 9, 9), device, torch.bfloat16)
    extra = needs(objective, 3, device)
    del extra["reference_errors"]
    reference = make((6, 4, 9, 9), device)[0].detach() * 0.1 + t
    out = check(p, t, objective=objective, reference_prediction=reference.to(torch.bfloat16), **extra)
    assert out.chosen_reference_error is not None


def test_reference_prediction_in_any_form(device: str) -> None:
    p, t = make((6, 3, 5, 7), device)
    reference = t + 0.1 * torch.randn_like(t)
    halves = tuple(reference.chunk(2))
    strided = torch.stack([reference, reference], -1).flatten(-2)[..., ::2]
    for mask in (None, torch.rand(3, 1, 5, 7, device=device)):
        for form in (reference, halves, strided, reference.to(memory_format=torch.channels_last),
                     reference.double()):  # fmt: skip
            check(p, t, objective="dpo", reference_prediction=form, mask=mask)
    five = [x.repeat_interleave(2, 0).unflatten(0, (-1, 2)) for x in (p, t, reference)]
    check(five[0].detach().requires_grad_(), five[1], objective="dpo", reference_prediction=five[2])


def test_reference_errors_are_those_of_the_prediction(device: str) -> None:
    """In one launch or in two, as tensors or as a prediction: the same bits."""
    p, t = make((6, 4, 9, 9), device)
    reference = t + 0.1 * torch.randn_like(t)
    errors = paired_loss(reference, t, objective="sft")
    want = paired_loss(p, t, objective="ipo", reference_prediction=reference)
    assert torch.equal(want.chosen_reference_error, errors.chosen_error)
    assert torch.equal(want.rejected_reference_error, errors.rejected_error)
    both = torch.cat([errors.chosen_error, errors.rejected_error])
    for given in ((errors.chosen_error, errors.rejected_error), both):
        got = paired_loss(p, t, objective="ipo", reference_errors=given)
        assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))
        assert torch.equal(gradient(got, p)[0], gradient(want, p)[0])
        want = paired_loss(p, t, objective="ipo", reference_prediction=reference)


def test_reference_errors_in_other_types(device: str) -> None:
    p, t = make((6, 4, 9, 9), device)
    r = torch.rand(2, 6, device=device)[:, ::2]
    got = paired_loss(p, t, objective="ipo", reference_errors=(r[0].double(), r[1].half()))
    assert got.loss.dtype == torch.float32
    want = paired_loss(p, t, objective="ipo", reference_errors=(r[0], r[1].half().float()))
    assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True))


def test_a_model_equal_to_its_reference_has_no_margin(device: str) -> None:
    p, t = make((6, 4, 9, 9), device, torch.bfloat16)
    out = paired_loss(p, t, objective="dpo", reference_prediction=p.detach())
    assert out.logits.tolist() == [0.0] * 3
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_swapped_halves_are_npo(device: str) -> None:
    """Diffusion-NPO is dpo with the halves swapped, to the bit; errors keep the names of the data."""
    p, t = make((6, 3, 5, 7), device)
    chosen, rejected = (h.detach().clone().requires_grad_() for h in p.chunk(2))
    extra = needs("dpo", 3, device)["reference_errors"]
    plain = paired_loss((chosen, rejected), t, objective="dpo", beta=2000.0, reference_errors=extra)
    npo = paired_loss((rejected, chosen), tuple(t.chunk(2)[::-1]), objective="dpo", beta=2000.0,
                      reference_errors=extra[::-1])  # fmt: skip
    named = paired_loss((chosen, rejected), t, objective="npo", reference_errors=extra)
    assert torch.equal(named.loss, npo.loss)
    assert torch.equal(named.logits, npo.logits)
    assert torch.equal(named.chosen_error, plain.chosen_error)
    for ours, theirs in zip(gradient(named, chosen, rejected), gradient(npo, chosen, rejected), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(npo.logits, -plain.logits)
    flipped = paired_loss((chosen, rejected), t, objective="dpo", beta=2000.0, reference_errors=extra,
                          labels=torch.zeros(3, device=device))  # fmt: skip
    torch.testing.assert_close(npo.loss, flipped.loss)


@pytest.mark.parametrize("given", [False, True])
def test_a_reference_costs_no_launch_and_is_not_saved(
    device: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = Counting(kernels._forward_kernel), Counting(kernels._backward_kernel)
    monkeypatch.setattr(kernels, "_forward_kernel", forward)
    monkeypatch.setattr(kernels, "_backward_kernel", backward)
    p, t = make((6, 4, 8, 8), device)
    extra = needs("dpo", 3, device) if given else {"reference_prediction": t + 0.1}
    gradient(paired_loss(p, t, objective="dpo", **extra), p)
    once = 0 if backend(device).name == "eager" else 1
    assert (forward.launches, backward.launches) == (once, once)
    saved = saved_bytes(lambda: paired_loss(p, t, objective="dpo", **extra).loss, [p, t])
    assert saved == 6 * 4  # the coefficients


# --- Soft labels ---


@pytest.mark.parametrize("objective", [name for name in LABELLED if name != "smpo"])
def test_labels_mix_both_answers(device: str, objective: str) -> None:
    p, t = make((6, 3, 5, 7), device)
    extra = needs(objective, 3, device) | {"objective": objective, "reduction": "none"}
    plain = paired_loss(p, t, **extra)
    sure = paired_loss(p, t, labels=torch.ones(3, device=device), **extra)
    torch.testing.assert_close(sure.loss, plain.loss)
    torch.testing.assert_close(sure.logits, plain.logits)
    wrong = paired_loss(p, t, labels=torch.zeros(3, device=device), **extra)
    labels = torch.tensor([0.9, 0.5, 0.2], device=device)
    soft = check(p, t, labels=labels, **extra)
    torch.testing.assert_close(soft.loss, labels * plain.loss + (1 - labels) * wrong.loss)
    # L(z) − L(−z) = −z, times what the objective puts before its L; an anchor e_w cancels.
    factor = (wrong.loss - plain.loss).detach().double() / plain.logits.double()
    front = {"mapo_code": 0.1, "mapo_paper_power": 10.0, "mapo_paper_scale": 10.0, "orpo": 0.1}
    torch.testing.assert_close(factor, torch.full_like(factor, front.get(objective, 1.0)), rtol=1e-3, atol=0)


def test_smpo_scales_by_its_labels(device: str) -> None:
    p, t = make((6, 3, 5, 7), device)
    extra = needs("dpo", 3, device) | {"reduction": "none"}
    labels = torch.tensor([1.0, 0.5, 0.0], device=device)
    out = paired_loss(p, t, objective="smpo", beta=50.0, labels=labels, **extra)
    ten = paired_loss(p, t, objective="dpo", beta=500.0, **extra)
    torch.testing.assert_close(out.logits, torch.stack([ten.logits[0], 0 * ten.logits[1], -ten.logits[2]]))
    assert out.loss[1].item() == pytest.approx(math.log(2), rel=1e-6)
    (grad,) = gradient(out, p, grad=torch.ones_like(out.loss))
    (want,) = gradient(ten, p, grad=torch.ones_like(out.loss))
    torch.testing.assert_close(grad[[0, 3]], want[[0, 3]])
    assert not grad[[1, 4]].any()


# --- KTO ---


def test_kto_is_a_mean_over_samples(device: str) -> None:
    """The released loss: each sample by itself, chosen ones desirable; the baseline is a device constant."""
    p, t = make((6, 3, 5, 7), device)
    extra = needs("kto", 3, device)
    out = paired_loss(p, t, objective="kto", desirable_weight=1.3, undesirable_weight=0.7, **extra)
    errors = (p - t).square().flatten(1).mean(1).double()
    gain = torch.cat(extra["reference_errors"]).double() - errors
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], device=device)
    weight = torch.where(sign > 0, 1.3, 0.7)
    want = (weight * (1 - torch.sigmoid(sign * 1000 * (gain - extra["kto_baseline"].double())))).mean()
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-4, atol=0)
    (a,), (b,) = gradient(out, p), torch.autograd.grad(want, p)
    torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-7)
    one = extra | {"kto_baseline": extra["kto_baseline"].view(1)}
    again = paired_loss(p, t, objective="kto", desirable_weight=1.3, undesirable_weight=0.7, **one)
    assert torch.equal(again.loss, out.loss)


# --- Linear-DPO ---


def test_linear_dpo_never_stops_pulling(device: str) -> None:
    e = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device).double().requires_grad_()
    zero = torch.zeros(2, device=device)
    out = paired_loss_from_errors(*e, objective="linear_dpo", reference_errors=(zero, zero), reduction="none")
    (slope,) = torch.autograd.grad(out.loss.sum(), e)
    assert slope.tolist() == [[0.001, 0.999], [-0.001, -0.999]]


# --- Settings ---


def test_default_settings() -> None:
    defaults = {name: {k: s.default for k, s in known.settings.items()} for name, known in OBJECTIVES.items()}
    mapo, dpo = {"beta": 0.1, "snr": 0.5, "num_train_timesteps": 1000.0}, {"beta": 5000.0}
    assert defaults == {
        **dict.fromkeys(("mapo_code", "mapo_paper_power", "mapo_paper_scale", "sft"), mapo),
        **dict.fromkeys(("dpo", "smpo", "ipo", "hinge"), dpo),
        "kto": {"beta": 1000.0, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "dmpo": {"beta": 6000.0, "alpha": 0.01},
        "linear_dpo": {"beta": 500.0, "eta": 0.001},
        "npo": {"beta": 2000.0},
        "orpo": {"beta": 0.1},
        "simpo": {"beta": 250.0, "gamma": 0.5},
        "cpo": {"beta": 250.0, "gamma": 0.0},
    }


# --- The operator ---


# --- Bad input ---

X = torch.zeros(4, 3, 2, 2)
R = (torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"objective": "dpo"}, ValueError, "reference_errors: 'dpo' compares with a reference model; pass"),
        ({"objective": "orpo", "reference_errors": R}, ValueError, "'orpo' has no reference model"),
        ({"reference_prediction": X}, ValueError, "'mapo_code' has no reference model; leave"),
        ({"objective": "dpo", "reference_errors": R, "reference_prediction": X}, ValueError, "pass one of"),
        ({"objective": "dpo", "reference_errors": (R[0], R[1][:1])}, ValueError, "reference_errors: shape"),
        ({"objective": "dpo", "reference_errors": R[0]}, TypeError, r"reference_errors: .*\(4,\)"),
        ({"objective": "dpo", "reference_errors": (R[0], 1.0)}, TypeError, "reference_errors: pass a float"),
        ({"objective": "dpo", "reference_errors": (R[0], R[1].clone().requires_grad_())}, ValueError,
         "reference_errors: requires a gradient"),
        ({"objective": "dpo", "reference_prediction": X[:2]}, ValueError, "reference_prediction: 1 pairs of"),
        ({"objective": "dpo", "reference_prediction": X.clone().requires_grad_()}, ValueError,
         r"reference_prediction: requires .* reference_prediction\.detach"),
        ({"objective": "dpo", "reference_prediction": X.long()}, TypeError, "reference_prediction: dtype"),
        ({"objective": "ipo", "reference_errors": R, "labels": torch.ones(2)}, ValueError,
         "labels: 'ipo' has no soft labels; leave them out or choose one of mapo_code"),
        ({"objective": "smpo", "reference_errors": R}, ValueError, "labels: 'smpo' needs them"),
        ({"objective": "dpo", "reference_errors": R, "labels": torch.ones(3)}, ValueError, "labels: shape"),
        ({"objective": "kto", "reference_errors": R}, ValueError, "kto_baseline: 'kto' needs one"),
        ({"kto_baseline": torch.zeros(())}, ValueError, "kto_baseline: 'mapo_code' has none"),
        ({"objective": "kto", "reference_errors": R, "kto_baseline": 0.0}, TypeError, "kto_baseline: pass"),
        ({"objective": "kto", "reference_errors": R, "kto_baseline": torch.zeros(2)}, ValueError,
         "kto_baseline: shape"),
        ({"objective": "dpo", "reference_errors": R, "snr": 0.5}, TypeError, "snr: 'dpo' has no such"),
        ({"objective": "dmpo", "reference_errors": R, "alpha": 1.0}, ValueError, "alpha: 1.0 must be bet"),
        ({"objective": "linear_dpo", "reference_errors": R, "eta": 0.5}, ValueError, "eta: 0.5 must be betw"),
        ({"objective": "simpo", "gamma": math.inf}, ValueError, "gamma: inf must be between"),
        ({"objective": "kto", "desirable_weight": -1.0}, ValueError, "desirable_weight: -1.0 must be p"),
    ],
)  # fmt: skip
def test_bad_input(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        paired_loss(X, X, **settings)
    assert "\n" not in str(caught.value)
    if "reference_prediction" not in settings:
        with pytest.raises(error, match=message):
            paired_loss_from_errors(torch.ones(2), torch.ones(2), **settings)
