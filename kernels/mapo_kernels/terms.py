"""What the terms of an objective are made of, in kernels and in torch; for objectives from outside too.

`Terms` are an objective's arithmetic on a pair's errors, once as a Triton function and once in torch, where
there is no Triton. `mapo_kernels.objectives` says what they compute, `docs/extend/objective.md` how to add
some. All of it is fp64: it runs on B scalars only, so even a 1/64-rate fp64 unit costs nothing.

z = 0 gives the limit, a large finite z a finite loss, and an error that is Inf or NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._triton import jit, tl

__all__ = [
    "PairTerms",
    "Pairs",
    "SampleTerms",
    "Samples",
    "Terms",
    "jit",
    "log_loss",
    "log_loss_torch",
    "log_score",
    "log_score_torch",
    "log_sigmoid",
    "margin",
    "score",
    "score_torch",
    "sigmoids",
    "tl",
]

PairTerms = tuple[Tensor, Tensor, Tensor, Tensor]
"""(B,) each: loss, logit z, dloss/de_w, dloss/de_l."""
SampleTerms = tuple[Tensor, Tensor]
"""(n,) each: loss, differentiable in the errors, and logit z."""


class Pairs(NamedTuple):
    """What a torch twin gets of B pairs: fp64, (B,) each."""

    e_w: Tensor
    e_l: Tensor
    g_w: Tensor  # r_w − e_w, with r_w = 0 where there is no reference
    g_l: Tensor
    labels: Tensor | None
    baseline: Tensor | None

    @property
    def margin(self) -> Tensor:
        """How much more the model improved on the chosen sample."""
        return self.g_w - self.g_l


class Samples(NamedTuple):
    """What the terms of single samples get of n of them: fp64, (n,) each."""

    errors: Tensor
    gains: Tensor  # r − e, with r = 0 where there is no reference
    wanted: Tensor  # bool
    baseline: Tensor | None  # (), the mean of the gains; a number


class Terms(NamedTuple):
    """An objective's terms of pairs, with the derivative written out."""

    kernel: Any
    """A `jit` function of (e_w, e_l, r_w, r_l, label, baseline, a, b, c), fp64 each: returns loss, logit,
    dloss/de_w and dloss/de_l. r_w and r_l are 0 without a reference; label and baseline may be None. a, b and
    c are the objective's settings in order, those that it has not 0."""
    twin: Callable[..., PairTerms]
    """The kernel's function in torch, called with `Pairs` and as many settings as the objective has."""


# --- In kernels. Literals stand in them because Triton reads no Python globals. ---

# Below |z| = 1/2 the Bernoulli series z/(exp z − 1) = 1 − z/2 + Σ B₂ₖ z²ᵏ/(2k)! up to z¹⁴ is exact to 5e-18;
# above it exp(z) − 1 no longer cancels.


@jit
def margin(e_w, e_l, r_w, r_l):  # type: ignore[no-untyped-def]
    """Return (r_w − e_w) − (r_l − e_l): how much more the model improved on the chosen sample."""
    return (r_w - e_w) - (r_l - e_l)


@jit
def score(z):  # type: ignore[no-untyped-def]
    """Return s = z/(exp z − 1) and ds/dz."""
    small = tl.abs(z) < 0.5
    x = tl.where(small, 1.0, z)  # keeps 0/0 out of the branch that is not taken
    far = x / (tl.exp(x) - 1.0)
    far_slope = far * ((1.0 - x - far) / x)
    q = z * z
    near = 1.0 / 74724249600.0
    near = near * q - 691.0 / 1307674368000.0
    near = near * q + 1.0 / 47900160.0
    near = near * q - 1.0 / 1209600.0
    near = near * q + 1.0 / 30240.0
    near = near * q - 1.0 / 720.0
    near = near * q + 1.0 / 12.0
    near = near * q - 0.5 * z + 1.0
    near_slope = 14.0 / 74724249600.0
    near_slope = near_slope * q - 12.0 * 691.0 / 1307674368000.0
    near_slope = near_slope * q + 10.0 / 47900160.0
    near_slope = near_slope * q - 8.0 / 1209600.0
    near_slope = near_slope * q + 6.0 / 30240.0
    near_slope = near_slope * q - 4.0 / 720.0
    near_slope = near_slope * q + 2.0 / 12.0
    near_slope = near_slope * z - 0.5
    return tl.where(small, near, far), tl.where(small, near_slope, far_slope)


@jit
def log_score(z):  # type: ignore[no-untyped-def]
    """Return log s and dlog s/dz; exact also where s itself underflows."""
    s, slope = score(z)
    small = tl.abs(z) < 0.5
    x = tl.where(small, 1.0, z)
    size = tl.abs(x)
    far = tl.log(size) - tl.log(1.0 - tl.exp(-size)) - 0.5 * (x + size)
    far_slope = (1.0 - x - s) / x
    kept = tl.where(small, s, 1.0)
    return tl.where(small, tl.log(kept), far), tl.where(small, slope / kept, far_slope)


@jit
def sigmoids(u):  # type: ignore[no-untyped-def]
    """Return σ(u) and σ(−u), both with all their digits."""
    t = tl.exp(-tl.abs(u))
    return tl.where(u >= 0, 1.0, t) / (1.0 + t), tl.where(u >= 0, t, 1.0) / (1.0 + t)


@jit
def log_sigmoid(u):  # type: ignore[no-untyped-def]
    """Return log σ(u) and its derivative σ(−u)."""
    t = tl.exp(-tl.abs(u))
    return 0.5 * (u - tl.abs(u)) - tl.log(1.0 + t), tl.where(u >= 0, t, 1.0) / (1.0 + t)


@jit
def log_loss(z, label):  # type: ignore[no-untyped-def]
    """Return −log σ(z), or with a label p·(−log σ(z)) + (1 − p)·(−log σ(−z)), and the derivative."""
    log_sigma, away = log_sigmoid(z)
    if label is None:
        loss = -log_sigma
        slope = -away
    else:
        log_away, sigma = log_sigmoid(-z)
        loss = -(label * log_sigma + (1.0 - label) * log_away)
        slope = (1.0 - label) * sigma - label * away
    return loss, slope


# --- In torch ---

_EVEN_TERMS = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
)
"""B₂ₖ/(2k)! for k = 1 … 7."""


def score_torch(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = z/(exp z − 1) and ds/dz."""
    small = z.abs() < 0.5
    x = torch.where(small, 1.0, z)
    far = x / torch.expm1(x)
    far_slope = far * ((1.0 - x - far) / x)
    q = z * z
    near, near_slope = torch.zeros_like(z), torch.zeros_like(z)
    for k in range(len(_EVEN_TERMS), 0, -1):
        near = near * q + _EVEN_TERMS[k - 1]
        near_slope = near_slope * q + 2 * k * _EVEN_TERMS[k - 1]
    near = near * q - 0.5 * z + 1.0
    near_slope = near_slope * z - 0.5
    return torch.where(small, near, far), torch.where(small, near_slope, far_slope)


def log_score_torch(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return log s and dlog s/dz."""
    s, slope = score_torch(z)
    small = z.abs() < 0.5
    x = torch.where(small, 1.0, z)
    far = x.abs().log() - torch.log(-torch.expm1(-x.abs())) - 0.5 * (x + x.abs())
    far_slope = (1.0 - x - s) / x
    kept = torch.where(small, s, 1.0)
    return torch.where(small, kept.log(), far), torch.where(small, slope / kept, far_slope)


def log_loss_torch(z: Tensor, labels: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """Return −log σ(z), or with labels p·(−log σ(z)) + (1 − p)·(−log σ(−z)), and the derivative."""
    log_sigma = torch.nn.functional.logsigmoid
    if labels is None:
        return -log_sigma(z), -torch.sigmoid(-z)
    loss = -(labels * log_sigma(z) + (1 - labels) * log_sigma(-z))
    return loss, (1 - labels) * torch.sigmoid(z) - labels * torch.sigmoid(-z)
