"""The definition of the paired loss: fp64, differentiated by autograd, independent of the epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_kernels.ops._noise import NoiseTarget, TensorOrPair, normals_torch
from mapo_kernels.ops._pair_checks import check_settings
from mapo_kernels.ops._pair_result import PairedLoss


def _log_score(z: Tensor) -> Tensor:
    """log(z/(exp z − 1)) for z ≥ 0, in a form that autograd can differentiate without cancellation."""
    small = z < 1e-3
    x = torch.where(small, 1.0, z)
    series = torch.log1p(-z / 2 + z**2 / 12 - z**4 / 720)
    return torch.where(small, series, torch.log(x) - x - torch.log(-torch.expm1(-x)))


def _label_loss(z: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy of "the chosen sample is better" against the labels."""
    if labels is None:
        return -F.logsigmoid(z)
    return torch.lerp(-F.logsigmoid(-z), -F.logsigmoid(z), labels.to(z.dtype))


def reference_terms(
    e_w: Tensor,
    e_l: Tensor,
    r_w: Tensor,  # 0 without a reference
    r_l: Tensor,
    labels: Tensor | None,
    kto_baseline: Tensor | None,
    objective: str,
    settings: list[float],
) -> tuple[Tensor, Tensor]:
    """Return each pair's loss and logit.

    Raises:
        ValueError: the objective is from outside this package.
    """
    if objective == "npo":
        return reference_terms(e_l, e_w, r_l, r_w, labels, kto_baseline, "dpo", settings)
    beta, second, third = settings
    delta = (e_w - r_w) - (e_l - r_l)
    u = -beta * delta / 2
    if objective == "sft":
        return e_w, e_l - e_w
    if objective == "mapo_code":
        s_w, s_l = (_log_score(second * e).exp() for e in (e_w, e_l))
        logits = third * (s_w - s_l)
        return e_w + beta * _label_loss(logits, labels), logits
    if objective.startswith("mapo_paper"):
        if objective == "mapo_paper_power":
            phi_w, phi_l = ((beta * _log_score(e)).exp() for e in (e_w, e_l))
        else:
            phi_w, phi_l = (beta * _log_score(e).exp() for e in (e_w, e_l))
        return e_w + _label_loss(phi_w - phi_l, labels) / beta, phi_w - phi_l
    if objective == "dpo":
        return _label_loss(u, labels), u
    if objective == "smpo":
        assert labels is not None
        z = u * 10 * (2 * labels.to(u.dtype) - 1)
        return -F.logsigmoid(z), z
    if objective == "ipo":
        return (-delta - 1 / (2 * beta)) ** 2, -delta
    if objective == "hinge":
        return F.relu(1 + beta * delta), -beta * delta
    if objective == "kto":
        assert kto_baseline is not None
        chosen, rejected = (r - e - kto_baseline.to(e.dtype).view(()) for e, r in ((e_w, r_w), (e_l, r_l)))
        values = second * (1 - torch.sigmoid(beta * chosen)), third * (1 - torch.sigmoid(-beta * rejected))
        return torch.stack(values).mean(0), -beta * delta
    if objective == "dmpo":
        model = torch.stack([F.logsigmoid(u), F.logsigmoid(-u)])
        wanted = torch.tensor([1 - second, second], dtype=u.dtype, device=u.device).log()
        return F.kl_div(wanted[:, None].expand_as(model), model, reduction="none", log_target=True).sum(0), u
    if objective == "linear_dpo":
        strength = (0.2 * beta * delta + 0.5).clamp(second, 1 - second).detach()
        return strength * (e_w - e_l), -0.2 * beta * delta
    if objective == "orpo":
        return e_w + beta * _label_loss(e_l - e_w, labels), e_l - e_w
    if objective not in ("simpo", "cpo"):
        raise ValueError(f"objective: {objective!r} has no definition here: write its formula in your test")
    z = beta * (e_l - e_w) - second
    return _label_loss(z, labels) + (e_w if objective == "cpo" else 0), z


def _stack(value: TensorOrPair) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.cat(list(value))).double()


def _target(target: TensorOrPair | NoiseTarget, sample: tuple[int, ...]) -> Tensor:
    if not isinstance(target, NoiseTarget):
        return _stack(target)
    noise = normals_torch(target.keys, sample).double().repeat(2, *[1] * len(sample))
    if target.kind == "epsilon":
        return noise
    assert target.latents is not None
    latents = _stack(target.latents)
    if target.kind == "flow":
        return noise - latents
    assert target.alphas is not None
    assert target.sigmas is not None
    alpha, sigma = (s.double().repeat(2).view(-1, *[1] * len(sample)) for s in (target.alphas, target.sigmas))
    return alpha * noise - sigma * latents


def paired_loss_reference(
    prediction: TensorOrPair,
    target: TensorOrPair | NoiseTarget,
    *,
    objective: str = "mapo_code",
    reference_errors: TensorOrPair | None = None,
    reference_prediction: TensorOrPair | None = None,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    kto_baseline: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    **settings: Any,
) -> PairedLoss:
    """The definition of `paired_loss`, in fp64 throughout and differentiated by autograd. Slow; for tests."""
    p = _stack(prediction)
    t = _target(target, tuple(p.shape[1:]))
    if mask is None:
        m = torch.ones_like(p)
    else:
        both = mask if mask.shape[0] in (1, len(p)) else torch.cat([mask, mask])
        m = both.double().expand_as(p)

    def errors(x: Tensor) -> tuple[Tensor, ...]:
        return ((m * (x - t) ** 2).flatten(1).sum(1) / m.flatten(1).sum(1)).chunk(2)

    e_w, e_l = errors(p)
    reference: tuple[Tensor, ...] = ()
    if reference_prediction is not None:
        reference = errors(_stack(reference_prediction))
    elif reference_errors is not None:
        reference = _stack(reference_errors).chunk(2)
    r_w, r_l = reference or (torch.zeros_like(e_w), torch.zeros_like(e_l))
    values = check_settings(objective, settings, reduction)
    loss, logits = reference_terms(e_w, e_l, r_w, r_l, labels, kto_baseline, objective, values)
    if weights is not None:
        loss = loss * weights.double()
    if reduction == "mean":
        loss = loss.mean()
    logits = logits.detach()
    return PairedLoss(loss, e_w.detach(), e_l.detach(), logits, logits > 0, *(r.detach() for r in reference))
