"""The paired loss in plain torch, for devices without Triton: the kernels' arithmetic, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels.objectives import OBJECTIVES, resolve
from mapo_kernels.ops._noise import noise_target_torch, normals_torch
from mapo_kernels.ops._pair_kernels import Outputs, PairScalars
from mapo_kernels.ops._pair_layout import Halves, Operands, Target
from mapo_kernels.terms import Pairs, PairTerms


def _pair_terms(
    errors: Tensor,  # (2B,)
    reference_errors: Tensor | None,  # (2B,)
    scalars: PairScalars,
) -> PairTerms:
    """Return loss, logit, dloss/de_w and dloss/de_l, each (B,) fp64."""
    objective = OBJECTIVES[scalars.objective]
    e = errors.double()
    r = torch.zeros_like(e) if reference_errors is None else reference_errors.double()
    e_w, e_l = e.chunk(2)
    g_w, g_l = (r - e).chunk(2)
    labels, baseline = scalars.labels, scalars.baseline
    pair = Pairs(
        *((e_l, e_w, g_l, g_w) if objective.swapped else (e_w, e_l, g_w, g_l)),
        None if labels is None else labels.double(),
        None if baseline is None else baseline.double().view(()),
    )
    settings = scalars.settings[: len(objective.settings)]
    loss, logit, *slopes = resolve(objective.terms).twin(pair, *settings)
    d_w, d_l = reversed(slopes) if objective.swapped else slopes
    broken = (0.0 * e + 0.0 * r).view(2, -1).sum(0)
    return loss + broken, logit, d_w + broken, d_l + broken


def pair_outputs(
    errors: Tensor,  # (2B,)
    reference_errors: Tensor | None,  # (2B,)
    scalars: PairScalars,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, logits, correct and the fp64 dloss/de_w, dloss/de_l from the errors."""
    pair_loss, logits, d_w, d_l = _pair_terms(errors, reference_errors, scalars)
    if scalars.weights is not None:
        weight = scalars.weights.double()
        pair_loss, d_w, d_l = pair_loss * weight, d_w * weight, d_l * weight
    if not scalars.per_pair:
        pairs = len(pair_loss)
        pair_loss, d_w, d_l = pair_loss.mean(), d_w / pairs, d_l / pairs
    logits = logits.to(errors.dtype)
    return pair_loss.to(errors.dtype), logits, logits > 0, d_w, d_l


def _targets(target: Target, like: Halves, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    if target.kind == "stored":
        assert target.halves is not None
        return target.halves.chosen.to(acc), target.halves.rejected.to(acc)
    assert target.keys is not None
    noise = normals_torch(target.keys, tuple(like.chosen.shape[1:])).to(acc)
    chosen, rejected = target.halves or (None, None)
    return (
        noise_target_torch(target.kind, noise, chosen, target.alphas, target.sigmas),
        noise_target_torch(target.kind, noise, rejected, target.alphas, target.sigmas),
    )


def _square_sums(prediction: Halves, targets: tuple[Tensor, Tensor], mask: Halves | None) -> Tensor:
    """(2B,) fp64 sums of m·d²."""
    sample_dims = list(range(1, prediction.chosen.ndim))
    sums = []
    for p, t, m in zip(prediction, targets, mask or (None, None), strict=True):
        square = (p.to(t.dtype) - t).square_()
        if m is not None:
            square *= m.to(t.dtype)
        sums.append(square.sum(sample_dims).double())
    return torch.cat(sums)


def eager_forward(operands: Operands, scalars: PairScalars) -> Outputs:
    """What `launch_forward` returns."""
    prediction, target, mask, reference = operands
    acc = operands.accumulator
    targets = _targets(target, prediction, acc)
    if mask is None:
        numel = prediction.chosen[0].numel()
        count = torch.full(
            (2 * len(prediction.chosen),), numel, dtype=torch.float64, device=targets[0].device
        )
    else:
        sample_dims = list(range(1, prediction.chosen.ndim))
        count = torch.cat([m.to(acc).sum(sample_dims).double() for m in mask])
    errors = (_square_sums(prediction, targets, mask) / count).to(acc)
    reference_errors = None
    if reference is not None:
        reference_errors = (_square_sums(reference, targets, mask) / count).to(acc)
    elif scalars.reference_errors is not None:
        reference_errors = torch.cat([r.to(acc) for r in scalars.reference_errors])
    loss, logits, correct, d_w, d_l = pair_outputs(errors, reference_errors, scalars)
    return Outputs(
        loss=loss,
        errors=errors,
        reference_errors=errors.new_empty(0) if reference_errors is None else reference_errors,
        logits=logits,
        correct=correct,
        coefficients=(2.0 * torch.cat([d_w, d_l]) / count).to(acc),
    )


def eager_backward(
    grad_loss: Tensor,  # () or (B,)
    coefficients: Tensor,  # (2B,)
    operands: Operands,
    grad: Halves,
) -> None:
    """What `launch_backward` writes."""
    prediction, target, mask, _ = operands
    targets = _targets(target, prediction, coefficients.dtype)
    for p, t, m, g, c in zip(
        prediction, targets, mask or (None, None), grad, coefficients.chunk(2), strict=True
    ):
        difference = p.to(t.dtype) - t
        if m is not None:
            difference *= m.to(t.dtype)
        g.copy_(difference * (c * grad_loss).view(-1, *[1] * (p.ndim - 1)))
