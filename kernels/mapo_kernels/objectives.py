"""Per-pair objectives: what a pair's two errors are worth, with the derivative written out.

e_w and e_l are the mean squared errors of the chosen and the rejected sample. An objective maps them to
(loss, logit, dloss/de_w, dloss/de_l); everything else about a paired loss is shared. To add one: a Triton
function, its torch twin, and a line in `pair_terms`, in `_TWINS` and in `OBJECTIVES`.

All of it is fp64. The scores s(e) = z/(exp z − 1), z = λe, of two nearly equal errors cancel when subtracted,
and T = 1000 amplifies what is left: in fp32 the released code's logit is off by up to 33. In fp64 the
plain formulas keep ≥ 12 digits, and they run on B scalars only, so even a 1/64-rate fp64 unit costs nothing.

    mapo_code           loss = e_w − β·logσ(T·(s(e_w) − s(e_l)))       the MaPO authors' released code
    mapo_paper_power    loss = e_w − logσ(φ(e_w) − φ(e_l)) / β,  φ(x) = (x/(exp x − 1))^β   (arXiv 2406.06424
    mapo_paper_scale    the same with φ(x) = β·x/(exp x − 1)                                 eq. 9–11)
    sft                 loss = e_w;  its logit is the plain margin e_l − e_w

z = 0 gives the limit, a large finite z gives 0, and z = ±inf or NaN gives NaN: nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mapo_kernels._launch import jit, tl

OBJECTIVES = ("mapo_code", "mapo_paper_power", "mapo_paper_scale", "sft")

# Below |z| = 1/2 the Bernoulli series z/(exp z − 1) = 1 − z/2 + Σ B₂ₖ z²ᵏ/(2k)! up to z¹⁴ is exact to 5e-18;
# above it exp(z) − 1 no longer cancels. Literals stand in the kernel because Triton reads no Python globals.


@jit
def _score(z):  # type: ignore[no-untyped-def]
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
def _log_score(z):  # type: ignore[no-untyped-def]
    """Return log s and dlog s/dz; exact also where s itself underflows."""
    s, slope = _score(z)
    small = tl.abs(z) < 0.5
    x = tl.where(small, 1.0, z)
    size = tl.abs(x)
    far = tl.log(size) - tl.log(1.0 - tl.exp(-size)) - 0.5 * (x + size)
    far_slope = (1.0 - x - s) / x
    kept = tl.where(small, s, 1.0)
    return tl.where(small, tl.log(kept), far), tl.where(small, slope / kept, far_slope)


@jit
def _log_sigmoid(u):  # type: ignore[no-untyped-def]
    """Return log σ(u) and its derivative σ(−u)."""
    t = tl.exp(-tl.abs(u))
    return 0.5 * (u - tl.abs(u)) - tl.log(1.0 + t), tl.where(u >= 0, t, 1.0) / (1.0 + t)


@jit
def _mapo_code(e_w, e_l, beta, snr, timesteps):  # type: ignore[no-untyped-def]
    s_w, slope_w = _score(snr * e_w)
    s_l, slope_l = _score(snr * e_l)
    logit = timesteps * (s_w - s_l)
    log_sigma, sigma = _log_sigmoid(logit)
    pull = beta * sigma * timesteps * snr
    return e_w - beta * log_sigma, logit, 1.0 - pull * slope_w, pull * slope_l


@jit
def _mapo_paper_power(e_w, e_l, beta):  # type: ignore[no-untyped-def]
    log_w, slope_w = _log_score(e_w)
    log_l, slope_l = _log_score(e_l)
    phi_w = tl.exp(beta * log_w)
    phi_l = tl.exp(beta * log_l)
    logit = phi_w - phi_l
    log_sigma, sigma = _log_sigmoid(logit)
    # dφ/dx = β·φ·dlog s/dx, and the β cancels the loss's 1/β
    return e_w - log_sigma / beta, logit, 1.0 - sigma * phi_w * slope_w, sigma * phi_l * slope_l


@jit
def _mapo_paper_scale(e_w, e_l, beta):  # type: ignore[no-untyped-def]
    s_w, slope_w = _score(e_w)
    s_l, slope_l = _score(e_l)
    logit = beta * (s_w - s_l)
    log_sigma, sigma = _log_sigmoid(logit)
    return e_w - log_sigma / beta, logit, 1.0 - sigma * slope_w, sigma * slope_l


@jit
def _sft(e_w, e_l):  # type: ignore[no-untyped-def]
    # 0·e lets NaN and Inf through: a broken sample may not look healthy in the gradient
    return e_w, e_l - e_w, 1.0 + 0.0 * e_w, 0.0 * e_l


@jit
def pair_terms(e_w, e_l, beta, snr, timesteps, OBJECTIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (loss, logit, dloss/de_w, dloss/de_l) of pairs, all fp64; for use inside kernels."""
    if OBJECTIVE == "mapo_code":
        loss, logit, d_w, d_l = _mapo_code(e_w, e_l, beta, snr, timesteps)
    elif OBJECTIVE == "mapo_paper_power":
        loss, logit, d_w, d_l = _mapo_paper_power(e_w, e_l, beta)
    elif OBJECTIVE == "mapo_paper_scale":
        loss, logit, d_w, d_l = _mapo_paper_scale(e_w, e_l, beta)
    else:
        tl.static_assert(OBJECTIVE == "sft")
        loss, logit, d_w, d_l = _sft(e_w, e_l)
    return loss, logit, d_w, d_l


# --- The same in torch: what runs without Triton and on the CPU. ---

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


def _score_torch(z: Tensor) -> tuple[Tensor, Tensor]:
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


def _log_score_torch(z: Tensor) -> tuple[Tensor, Tensor]:
    s, slope = _score_torch(z)
    small = z.abs() < 0.5
    x = torch.where(small, 1.0, z)
    far = x.abs().log() - torch.log(-torch.expm1(-x.abs())) - 0.5 * (x + x.abs())
    far_slope = (1.0 - x - s) / x
    kept = torch.where(small, s, 1.0)
    return torch.where(small, kept.log(), far), torch.where(small, slope / kept, far_slope)


def _log_sigmoid_torch(u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.logsigmoid(u), torch.sigmoid(-u)


_Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def _mapo_code_torch(e_w: Tensor, e_l: Tensor, beta: float, snr: float, timesteps: float) -> _Terms:
    s_w, slope_w = _score_torch(snr * e_w)
    s_l, slope_l = _score_torch(snr * e_l)
    logit = timesteps * (s_w - s_l)
    log_sigma, sigma = _log_sigmoid_torch(logit)
    pull = beta * sigma * timesteps * snr
    return e_w - beta * log_sigma, logit, 1.0 - pull * slope_w, pull * slope_l


def _mapo_paper_power_torch(e_w: Tensor, e_l: Tensor, beta: float, snr: float, timesteps: float) -> _Terms:
    log_w, slope_w = _log_score_torch(e_w)
    log_l, slope_l = _log_score_torch(e_l)
    phi_w, phi_l = torch.exp(beta * log_w), torch.exp(beta * log_l)
    logit = phi_w - phi_l
    log_sigma, sigma = _log_sigmoid_torch(logit)
    return e_w - log_sigma / beta, logit, 1.0 - sigma * phi_w * slope_w, sigma * phi_l * slope_l


def _mapo_paper_scale_torch(e_w: Tensor, e_l: Tensor, beta: float, snr: float, timesteps: float) -> _Terms:
    s_w, slope_w = _score_torch(e_w)
    s_l, slope_l = _score_torch(e_l)
    logit = beta * (s_w - s_l)
    log_sigma, sigma = _log_sigmoid_torch(logit)
    return e_w - log_sigma / beta, logit, 1.0 - sigma * slope_w, sigma * slope_l


def _sft_torch(e_w: Tensor, e_l: Tensor, beta: float, snr: float, timesteps: float) -> _Terms:
    return e_w, e_l - e_w, 1.0 + 0.0 * e_w, 0.0 * e_l


_TWINS: dict[str, Callable[..., Any]] = {
    "mapo_code": _mapo_code_torch,
    "mapo_paper_power": _mapo_paper_power_torch,
    "mapo_paper_scale": _mapo_paper_scale_torch,
    "sft": _sft_torch,
}


def pair_terms_torch(
    e_w: Tensor,  # (B,), any floating dtype
    e_l: Tensor,  # (B,)
    objective: str,
    beta: float,
    snr: float,
    timesteps: float,
) -> _Terms:
    """Return (loss, logit, dloss/de_w, dloss/de_l), each (B,) fp64, with torch operations."""
    terms: _Terms = _TWINS[objective](e_w.double(), e_l.double(), beta, snr, timesteps)
    return terms
