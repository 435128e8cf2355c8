"""Batches of pairs, and the paired loss as one would write it by hand, for the tests of the loss family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapo_kernels import OBJECTIVES, PairedLoss, paired_loss
from mapo_kernels.ops._pair_checks import check_settings
from mapo_kernels.ops._pair_reference import reference_terms
from mapo_kernels.reference import paired_loss_reference


def make(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, gap: float = 0.1
) -> tuple[Tensor, Tensor]:
    """A prediction whose errors are around gap², and its target."""
    target = torch.randn(shape)
    prediction = target + gap * torch.randn(shape)
    return prediction.to(device, dtype).requires_grad_(), target.to(device, dtype)


def needs(objective: str, pairs: int, device: str, error: float = 0.01) -> dict[str, Any]:
    """What an objective cannot do without: reference errors around `error`, labels, KTO's baseline."""
    known = OBJECTIVES[objective]
    extra: dict[str, Any] = {}
    if known.reference:
        errors = error * (1 + 0.1 * torch.rand(2, pairs, device=device))
        extra["reference_errors"] = (errors[0], errors[1])
    if known.labels == "required":
        extra["labels"] = torch.rand(pairs, device=device)
    if known.baseline:
        extra["kto_baseline"] = torch.tensor(0.02 * error, device=device)
    return extra


def gradient(out: Any, *inputs: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.loss, inputs, grad)


def stacked(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.cat(list(x))


def eager_loss(prediction: Any, target: Any, **settings: Any) -> PairedLoss:
    """What one would write by hand: fp32 errors, differentiated by autograd."""
    t = stacked(target).float()
    mask = settings.pop("mask", None)
    weights = settings.pop("weights", None)
    labels = settings.pop("labels", None)
    baseline = settings.pop("kto_baseline", None)
    objective = settings.pop("objective", "mapo_code")
    reduction = settings.pop("reduction", "mean")

    def errors(x: Any) -> tuple[Tensor, ...]:
        square = (stacked(x).float() - t) ** 2
        if mask is None:
            return square.flatten(1).mean(1).chunk(2)
        m = mask if mask.shape[0] in (1, len(t)) else torch.cat([mask, mask])
        m = m.float().expand_as(square)
        return ((square * m).flatten(1).sum(1) / m.flatten(1).sum(1)).chunk(2)

    e_w, e_l = errors(prediction)
    if (reference := settings.pop("reference_prediction", None)) is not None:
        r_w, r_l = errors(reference)
    elif (given := settings.pop("reference_errors", None)) is not None:
        r_w, r_l = stacked(given).float().chunk(2)
    else:
        r_w, r_l = torch.zeros_like(e_w), torch.zeros_like(e_l)
    values = check_settings(objective, settings, reduction)
    loss, logits = reference_terms(
        *(x.double() for x in (e_w, e_l, r_w, r_l)), labels, baseline, objective, values
    )
    loss = loss if weights is None else loss * weights
    return PairedLoss(loss.mean() if reduction == "mean" else loss, e_w, e_l, logits, logits > 0, r_w, r_l)


def check(prediction: Any, target: Any, **settings: Any) -> PairedLoss:
    """Loss, diagnostics and gradients against fp64, by the three-way rule: no worse than eager + rounding."""
    leaves = prediction if isinstance(prediction, tuple) else (prediction,)
    out = paired_loss(prediction, target, **settings)
    truth = paired_loss_reference(prediction, target, **settings)
    grad = torch.randn_like(truth.loss)
    got = gradient(out, *leaves, grad=grad.to(out.loss.dtype))
    want = [g.double() for g in gradient(truth, *leaves, grad=grad)]
    eager = eager_loss(prediction, target, **settings)
    eager_grads = gradient(eager, *leaves, grad=grad.to(eager.loss.dtype))

    fields = ["chosen_error", "rejected_error", "loss"]
    if truth.chosen_reference_error is not None:
        fields += ["chosen_reference_error", "rejected_reference_error"]
    for field in fields:
        a, b, c = (getattr(x, field).detach().double() for x in (out, truth, eager))
        tolerance = (c - b).abs().max() + 16 * torch.finfo(out.loss.dtype).eps * (1 + b.abs().max())
        assert (a - b).abs().max() <= tolerance, field
    assert (out.logits.double() - truth.logits).abs().max() <= 1e-3
    assert torch.equal(out.correct, out.logits > 0)
    assert out.correct.dtype == torch.bool
    for a, b, c, leaf in zip(got, want, eager_grads, leaves, strict=True):
        assert a.shape == leaf.shape
        assert a.dtype == leaf.dtype
        rounding = torch.finfo(leaf.dtype).eps * b.abs().max() + torch.finfo(leaf.dtype).smallest_normal
        assert (a.double() - b).abs().max() <= (c.double() - b).abs().max() + 2 * rounding
    return out


class Counting:
    """Stands in a kernel's place and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


def tensors(out: PairedLoss) -> list[Tensor]:
    """The outputs that there are."""
    return [x for x in out if x is not None]
