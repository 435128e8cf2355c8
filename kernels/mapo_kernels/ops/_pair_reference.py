"""The definition of the paired loss: fp64, differentiated by autograd, independent of the epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_kernels.objectives import OBJECTIVES
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


class _Errors(NamedTuple):
    """What a definition is given, (B,) each."""

    e_w: Tensor
    e_l: Tensor
    r_w: Tensor  # 0 without a reference
    r_l: Tensor
    labels: Tensor | None
    baseline: Tensor | None

    @property
    def delta(self) -> Tensor:
        return (self.e_w - self.r_w) - (self.e_l - self.r_l)

    @property
    def exchanged(self) -> _Errors:
        return self._replace(e_w=self.e_l, e_l=self.e_w, r_w=self.r_l, r_l=self.r_w)


_Terms = tuple[Tensor, Tensor]
"""Loss and logit."""


def _mapo_code(x: _Errors, beta: float, snr: float, timesteps: float) -> _Terms:
    s_w, s_l = (_log_score(snr * e).exp() for e in (x.e_w, x.e_l))
    logits = timesteps * (s_w - s_l)
    return x.e_w + beta * _label_loss(logits, x.labels), logits


def _mapo_paper(x: _Errors, beta: float, phi: Callable[[Tensor], Tensor]) -> _Terms:
    logits = phi(x.e_w) - phi(x.e_l)
    return x.e_w + _label_loss(logits, x.labels) / beta, logits


def _dpo(x: _Errors, beta: float) -> _Terms:
    u = -beta * x.delta / 2
    return _label_loss(u, x.labels), u


def _smpo(x: _Errors, beta: float) -> _Terms:
    assert x.labels is not None
    z = -beta * x.delta / 2 * 10 * (2 * x.labels.to(x.delta.dtype) - 1)
    return -F.logsigmoid(z), z


def _kto(x: _Errors, beta: float, desirable: float, undesirable: float) -> _Terms:
    assert x.baseline is not None
    k = x.baseline.to(x.e_w.dtype).view(())
    chosen = desirable * (1 - torch.sigmoid(beta * (x.r_w - x.e_w - k)))
    rejected = undesirable * (1 - torch.sigmoid(-beta * (x.r_l - x.e_l - k)))
    return torch.stack([chosen, rejected]).mean(0), -beta * x.delta


def _dmpo(x: _Errors, beta: float, alpha: float) -> _Terms:
    u = -beta * x.delta / 2
    model = torch.stack([F.logsigmoid(u), F.logsigmoid(-u)])
    wanted = torch.tensor([1 - alpha, alpha], dtype=u.dtype, device=u.device).log()
    return F.kl_div(wanted[:, None].expand_as(model), model, reduction="none", log_target=True).sum(0), u


def _linear_dpo(x: _Errors, beta: float, eta: float) -> _Terms:
    strength = (0.2 * beta * x.delta + 0.5).clamp(eta, 1 - eta).detach()
    return strength * (x.e_w - x.e_l), -0.2 * beta * x.delta


def _simpo(x: _Errors, beta: float, gamma: float) -> _Terms:
    z = beta * (x.e_l - x.e_w) - gamma
    return _label_loss(z, x.labels), z


def _cpo(x: _Errors, beta: float, gamma: float) -> _Terms:
    loss, z = _simpo(x, beta, gamma)
    return loss + x.e_w, z


_DEFINITIONS: dict[str, Callable[..., _Terms]] = {
    "mapo_code": _mapo_code,
    "mapo_paper_power": lambda x, b, *_: _mapo_paper(x, b, lambda e: (b * _log_score(e)).exp()),
    "mapo_paper_scale": lambda x, b, *_: _mapo_paper(x, b, lambda e: b * _log_score(e).exp()),
    "sft": lambda x, *_: (x.e_w, x.e_l - x.e_w),
    "dpo": _dpo,
    "smpo": _smpo,
    "ipo": lambda x, beta: ((-x.delta - 1 / (2 * beta)) ** 2, -x.delta),
    "hinge": lambda x, beta: (F.relu(1 + beta * x.delta), -beta * x.delta),
    "kto": _kto,
    "dmpo": _dmpo,
    "linear_dpo": _linear_dpo,
    "npo": lambda x, beta: _dpo(x.exchanged, beta),
    "orpo": lambda x, beta: (x.e_w + beta * _label_loss(x.e_l - x.e_w, x.labels), x.e_l - x.e_w),
    "simpo": _simpo,
    "cpo": _cpo,
}


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
    if objective not in _DEFINITIONS:
        raise ValueError(f"objective: {objective!r} has no definition here: write its formula in your test")
    errors = _Errors(e_w, e_l, r_w, r_l, labels, kto_baseline)
    return _DEFINITIONS[objective](errors, *settings[: len(OBJECTIVES[objective].settings)])


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
