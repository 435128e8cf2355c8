"""Per-pair objectives: what a pair's errors are worth, with the derivative written out.

e_w and e_l are the mean squared errors of the chosen and the rejected sample, r_w and r_l the same errors of
a frozen reference model (0 where an objective has none). An objective maps them to (loss, logit, dloss/de_w,
dloss/de_l); everything else about a paired loss is shared. To add one: a Triton function with its line in
`pair_terms`, its torch twin, and an entry in `OBJECTIVES`. No kernel changes.

m = (r_w − e_w) − (r_l − e_l) is the margin: how much more the model improved on the chosen sample than on the
rejected one. In the usual notation m = −Δ and u = ½βm. L(z) = −logσ(z).

    name                loss                                 logit z                            reference
    mapo_code           e_w + β·L(z)                         T·(s(e_w) − s(e_l))                no
    mapo_paper_power    e_w + L(z)/β                         φ(e_w) − φ(e_l), φ = (x/(eˣ − 1))^β   no
    mapo_paper_scale    e_w + L(z)/β                         φ(e_w) − φ(e_l), φ = β·x/(eˣ − 1)     no
    sft                 e_w                                  m, only reported                   no
    dpo                 L(z)                                 u                                  yes
    smpo                L(z)                                 u·10(2p − 1), needs labels p       yes
    ipo                 (z − 1/(2β))²                        m                                  yes
    hinge               max(0, 1 − z)                        βm                                 yes
    kto                 ½·(v_w·σ(−a) + v_l·σ(−b))            βm, only reported                  yes
                        a = β(r_w − e_w − k), b = −β(r_l − e_l − k)
    dmpo                KL(Bern(σ(z)) ‖ Bern(1 − α))         u                                  yes
    linear_dpo          c·(e_w − e_l), c constant            βm/5                               yes
                        c = clamp(½ − z, η, 1 − η)
    orpo                e_w + β·L(z)                         m = e_l − e_w                      no
    simpo               L(z)                                 βm − γ                             no
    cpo                 e_w + L(z)                           βm − γ                             no

Sources: MaPO's code form from the authors' released code, its paper forms from arXiv 2406.06424 eq. 9–11;
dpo, ipo and hinge from Diffusion-DPO and its diffusers example; kto from Diffusion-KTO; smpo, dmpo and
linear_dpo from their released code; orpo with the sign of diffusers' example corrected; simpo and cpo carried
over from language models. Diffusion-NPO is dpo with the halves swapped: pass (rejected, chosen) tuples.

Soft labels p, the probability that the chosen sample really is the better one, replace L(z) by
p·L(z) + (1 − p)·L(−z) (label smoothing, cDPO). An e_w outside L stays as it is. The objectives without an L
refuse labels; dmpo has its own smoothing α.

All of it is fp64. The scores s(e) = z/(exp z − 1), z = λe, of two nearly equal errors cancel when subtracted,
and T = 1000 amplifies what is left: in fp32 the released code's logit is off by up to 33. In fp64 the
plain formulas keep ≥ 12 digits, and they run on B scalars only, so even a 1/64-rate fp64 unit costs nothing.

z = 0 gives the limit, a large finite z a finite loss, and an error that is Inf or NaN gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._triton import jit, tl

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
def _sigmoids(u):  # type: ignore[no-untyped-def]
    """Return σ(u) and σ(−u), both with all their digits."""
    t = tl.exp(-tl.abs(u))
    return tl.where(u >= 0, 1.0, t) / (1.0 + t), tl.where(u >= 0, t, 1.0) / (1.0 + t)


@jit
def _log_sigmoid(u):  # type: ignore[no-untyped-def]
    """Return log σ(u) and its derivative σ(−u)."""
    t = tl.exp(-tl.abs(u))
    return 0.5 * (u - tl.abs(u)) - tl.log(1.0 + t), tl.where(u >= 0, t, 1.0) / (1.0 + t)


@jit
def _log_loss(z, label):  # type: ignore[no-untyped-def]
    """Return −log σ(z), or with a label p·(−log σ(z)) + (1 − p)·(−log σ(−z)), and the derivative."""
    log_sigma, away = _log_sigmoid(z)
    if label is None:
        loss = -log_sigma
        slope = -away
    else:
        log_away, sigma = _log_sigmoid(-z)
        loss = -(label * log_sigma + (1.0 - label) * log_away)
        slope = (1.0 - label) * sigma - label * away
    return loss, slope


@jit
def _mapo_code(e_w, e_l, label, beta, snr, timesteps):  # type: ignore[no-untyped-def]
    s_w, slope_w = _score(snr * e_w)
    s_l, slope_l = _score(snr * e_l)
    logit = timesteps * (s_w - s_l)
    loss, slope = _log_loss(logit, label)
    pull = beta * slope * timesteps * snr
    return e_w + beta * loss, logit, 1.0 + pull * slope_w, -pull * slope_l


@jit
def _mapo_paper_power(e_w, e_l, label, beta):  # type: ignore[no-untyped-def]
    log_w, slope_w = _log_score(e_w)
    log_l, slope_l = _log_score(e_l)
    phi_w = tl.exp(beta * log_w)
    phi_l = tl.exp(beta * log_l)
    logit = phi_w - phi_l
    loss, slope = _log_loss(logit, label)
    # dφ/dx = β·φ·dlog s/dx, and the β cancels the loss's 1/β
    return e_w + loss / beta, logit, 1.0 + slope * phi_w * slope_w, -slope * phi_l * slope_l


@jit
def _mapo_paper_scale(e_w, e_l, label, beta):  # type: ignore[no-untyped-def]
    s_w, slope_w = _score(e_w)
    s_l, slope_l = _score(e_l)
    logit = beta * (s_w - s_l)
    loss, slope = _log_loss(logit, label)
    return e_w + loss / beta, logit, 1.0 + slope * slope_w, -slope * slope_l


@jit
def _sft(e_w, e_l, margin):  # type: ignore[no-untyped-def]
    # 0·e lets NaN and Inf through: a broken sample may not look healthy in the gradient
    return e_w, margin, 1.0 + 0.0 * e_w, 0.0 * e_l


@jit
def _dpo(margin, label, beta):  # type: ignore[no-untyped-def]
    u = 0.5 * beta * margin
    loss, slope = _log_loss(u, label)
    pull = 0.5 * beta * slope
    return loss, u, -pull, pull


@jit
def _smpo(margin, label, beta):  # type: ignore[no-untyped-def]
    rate = 5.0 * beta * (2.0 * label - 1.0)
    log_sigma, away = _log_sigmoid(rate * margin)
    return -log_sigma, rate * margin, rate * away, -rate * away


@jit
def _ipo(margin, beta):  # type: ignore[no-untyped-def]
    miss = margin - 0.5 / beta
    return miss * miss, margin, -2.0 * miss, 2.0 * miss


@jit
def _hinge(margin, beta):  # type: ignore[no-untyped-def]
    z = beta * margin
    pull = tl.where(z < 1.0, beta, 0.0)
    return tl.where(z < 1.0, 1.0 - z, 0.0), z, pull, -pull


@jit
def _kto(g_w, g_l, baseline, beta, desirable, undesirable):  # type: ignore[no-untyped-def]
    a = beta * (g_w - baseline)
    b = -beta * (g_l - baseline)
    sigma_a, away_a = _sigmoids(a)
    sigma_b, away_b = _sigmoids(b)
    loss = 0.5 * (desirable * away_a + undesirable * away_b)
    d_w = 0.5 * desirable * beta * sigma_a * away_a
    d_l = -0.5 * undesirable * beta * sigma_b * away_b
    return loss, beta * (g_w - g_l), d_w, d_l


@jit
def _dmpo(margin, beta, alpha):  # type: ignore[no-untyped-def]
    u = 0.5 * beta * margin
    log_sigma, away = _log_sigmoid(u)
    log_away, sigma = _log_sigmoid(-u)
    log_keep = tl.log(1.0 - alpha)
    log_flip = tl.log(alpha)
    loss = sigma * (log_sigma - log_keep) + away * (log_away - log_flip)
    pull = 0.5 * beta * sigma * away * (u - log_keep + log_flip)
    return loss, u, -pull, pull


@jit
def _linear_dpo(e_w, e_l, margin, beta, eta):  # type: ignore[no-untyped-def]
    z = 0.2 * beta * margin
    c = tl.minimum(tl.maximum(0.5 - z, eta), 1.0 - eta)
    return c * (e_w - e_l), z, c, -c


@jit
def _orpo(e_w, margin, label, beta):  # type: ignore[no-untyped-def]
    loss, slope = _log_loss(margin, label)
    return e_w + beta * loss, margin, 1.0 - beta * slope, beta * slope


@jit
def _simpo(margin, label, beta, gamma):  # type: ignore[no-untyped-def]
    z = beta * margin - gamma
    loss, slope = _log_loss(z, label)
    return loss, z, -beta * slope, beta * slope


@jit
def pair_terms(  # type: ignore[no-untyped-def]
    e_w,
    e_l,
    r_w,  # 0 without a reference
    r_l,
    label,  # or None
    baseline,  # or None
    a,  # the objective's settings, in the order of its entry in `OBJECTIVES`
    b,
    c,
    OBJECTIVE: tl.constexpr,
):
    """Return (loss, logit, dloss/de_w, dloss/de_l) of pairs, all fp64; for use inside kernels."""
    g_w = r_w - e_w
    g_l = r_l - e_l
    margin = g_w - g_l
    if OBJECTIVE == "mapo_code":
        loss, logit, d_w, d_l = _mapo_code(e_w, e_l, label, a, b, c)
    elif OBJECTIVE == "mapo_paper_power":
        loss, logit, d_w, d_l = _mapo_paper_power(e_w, e_l, label, a)
    elif OBJECTIVE == "mapo_paper_scale":
        loss, logit, d_w, d_l = _mapo_paper_scale(e_w, e_l, label, a)
    elif OBJECTIVE == "sft":
        loss, logit, d_w, d_l = _sft(e_w, e_l, margin)
    elif OBJECTIVE == "dpo":
        loss, logit, d_w, d_l = _dpo(margin, label, a)
    elif OBJECTIVE == "smpo":
        loss, logit, d_w, d_l = _smpo(margin, label, a)
    elif OBJECTIVE == "ipo":
        loss, logit, d_w, d_l = _ipo(margin, a)
    elif OBJECTIVE == "hinge":
        loss, logit, d_w, d_l = _hinge(margin, a)
    elif OBJECTIVE == "kto":
        loss, logit, d_w, d_l = _kto(g_w, g_l, baseline, a, b, c)
    elif OBJECTIVE == "dmpo":
        loss, logit, d_w, d_l = _dmpo(margin, a, b)
    elif OBJECTIVE == "linear_dpo":
        loss, logit, d_w, d_l = _linear_dpo(e_w, e_l, margin, a, b)
    elif OBJECTIVE == "orpo":
        loss, logit, d_w, d_l = _orpo(e_w, margin, label, a)
    else:
        loss, logit, d_w, d_l = _simpo(margin, label, a, b)
        if OBJECTIVE == "cpo":
            loss += e_w
            d_w += 1.0
        else:
            tl.static_assert(OBJECTIVE == "simpo")
    if OBJECTIVE != "sft":
        # A saturated sigmoid's slope is 0 at an infinite margin too; 0·∞ = NaN shows it in all of the pair.
        broken = 0.0 * e_w + 0.0 * e_l + 0.0 * r_w + 0.0 * r_l
        loss += broken
        d_w += broken
        d_l += broken
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


class Pairs(NamedTuple):
    """What a torch twin gets: fp64, (B,) each."""

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


_Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def _log_loss_torch(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    log_sigma = torch.nn.functional.logsigmoid
    if labels is None:
        return -log_sigma(z), -torch.sigmoid(-z)
    loss = -(labels * log_sigma(z) + (1 - labels) * log_sigma(-z))
    return loss, (1 - labels) * torch.sigmoid(z) - labels * torch.sigmoid(-z)


def _mapo_code_torch(pair: Pairs, beta: float, snr: float, timesteps: float) -> _Terms:
    s_w, slope_w = _score_torch(snr * pair.e_w)
    s_l, slope_l = _score_torch(snr * pair.e_l)
    logit = timesteps * (s_w - s_l)
    loss, slope = _log_loss_torch(logit, pair.labels)
    pull = beta * slope * timesteps * snr
    return pair.e_w + beta * loss, logit, 1.0 + pull * slope_w, -pull * slope_l


def _mapo_paper_power_torch(pair: Pairs, beta: float, *_: float) -> _Terms:
    log_w, slope_w = _log_score_torch(pair.e_w)
    log_l, slope_l = _log_score_torch(pair.e_l)
    phi_w, phi_l = torch.exp(beta * log_w), torch.exp(beta * log_l)
    logit = phi_w - phi_l
    loss, slope = _log_loss_torch(logit, pair.labels)
    return pair.e_w + loss / beta, logit, 1.0 + slope * phi_w * slope_w, -slope * phi_l * slope_l


def _mapo_paper_scale_torch(pair: Pairs, beta: float, *_: float) -> _Terms:
    s_w, slope_w = _score_torch(pair.e_w)
    s_l, slope_l = _score_torch(pair.e_l)
    logit = beta * (s_w - s_l)
    loss, slope = _log_loss_torch(logit, pair.labels)
    return pair.e_w + loss / beta, logit, 1.0 + slope * slope_w, -slope * slope_l


def _sft_torch(pair: Pairs, *_: float) -> _Terms:
    return pair.e_w, pair.margin, 1.0 + 0.0 * pair.e_w, 0.0 * pair.e_l


def _dpo_torch(pair: Pairs, beta: float) -> _Terms:
    u = 0.5 * beta * pair.margin
    loss, slope = _log_loss_torch(u, pair.labels)
    return loss, u, -0.5 * beta * slope, 0.5 * beta * slope


def _smpo_torch(pair: Pairs, beta: float) -> _Terms:
    assert pair.labels is not None
    rate = 5.0 * beta * (2.0 * pair.labels - 1.0)
    loss, slope = _log_loss_torch(rate * pair.margin, None)
    return loss, rate * pair.margin, -rate * slope, rate * slope


def _ipo_torch(pair: Pairs, beta: float) -> _Terms:
    miss = pair.margin - 0.5 / beta
    return miss * miss, pair.margin, -2.0 * miss, 2.0 * miss


def _hinge_torch(pair: Pairs, beta: float) -> _Terms:
    z = beta * pair.margin
    pull = beta * (z < 1.0).double()
    return torch.where(z < 1.0, 1.0 - z, 0.0), z, pull, -pull


def _kto_torch(pair: Pairs, beta: float, desirable: float, undesirable: float) -> _Terms:
    assert pair.baseline is not None
    a, b = beta * (pair.g_w - pair.baseline), -beta * (pair.g_l - pair.baseline)
    loss = 0.5 * (desirable * torch.sigmoid(-a) + undesirable * torch.sigmoid(-b))
    d_w = 0.5 * desirable * beta * torch.sigmoid(a) * torch.sigmoid(-a)
    d_l = -0.5 * undesirable * beta * torch.sigmoid(b) * torch.sigmoid(-b)
    return loss, beta * pair.margin, d_w, d_l


def _dmpo_torch(pair: Pairs, beta: float, alpha: float) -> _Terms:
    u = 0.5 * beta * pair.margin
    sigma, away = torch.sigmoid(u), torch.sigmoid(-u)
    log_sigma, log_away = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
    log_keep, log_flip = math.log(1.0 - alpha), math.log(alpha)
    loss = sigma * (log_sigma - log_keep) + away * (log_away - log_flip)
    pull = 0.5 * beta * sigma * away * (u - log_keep + log_flip)
    return loss, u, -pull, pull


def _linear_dpo_torch(pair: Pairs, beta: float, eta: float) -> _Terms:
    z = 0.2 * beta * pair.margin
    c = (0.5 - z).clamp(eta, 1.0 - eta)
    return c * (pair.e_w - pair.e_l), z, c, -c


def _orpo_torch(pair: Pairs, beta: float) -> _Terms:
    loss, slope = _log_loss_torch(pair.margin, pair.labels)
    return pair.e_w + beta * loss, pair.margin, 1.0 - beta * slope, beta * slope


def _simpo_torch(pair: Pairs, beta: float, gamma: float) -> _Terms:
    z = beta * pair.margin - gamma
    loss, slope = _log_loss_torch(z, pair.labels)
    return loss, z, -beta * slope, beta * slope


def _cpo_torch(pair: Pairs, beta: float, gamma: float) -> _Terms:
    loss, z, d_w, d_l = _simpo_torch(pair, beta, gamma)
    return pair.e_w + loss, z, 1.0 + d_w, d_l


# --- The registry ---


class Setting(NamedTuple):
    """A scalar of an objective; it must lie strictly between `low` and `high`."""

    default: float
    low: float = 0.0
    high: float = math.inf


class Objective(NamedTuple):
    """What the public functions have to know about an objective."""

    twin: Callable[..., _Terms]
    """Called with `Pairs` and the settings in order."""
    settings: dict[str, Setting]
    """At most three."""
    reference: bool = False
    """Whether it needs a reference model's errors; one that does not need them refuses them."""
    labels: Literal["refused", "optional", "required"] = "refused"
    baseline: bool = False
    """Whether it needs `kto_baseline`; the others refuse it."""


_MAPO = {"beta": Setting(0.1), "snr": Setting(0.5), "num_train_timesteps": Setting(1000.0)}
"""One set of settings for MaPO's forms and their control `sft`; a form ignores what it does not use."""
_DIFFUSION_DPO = {"beta": Setting(5000.0)}
"""Of the authors and of diffusers' example, which has one default for all its losses."""
_UNREFERENCED_BETA = Setting(250.0)
"""Ours, for want of a released one: the slope T·λ/2 of MaPO's logit at small errors."""

OBJECTIVES: dict[str, Objective] = {
    "mapo_code": Objective(_mapo_code_torch, _MAPO, labels="optional"),
    "mapo_paper_power": Objective(_mapo_paper_power_torch, _MAPO, labels="optional"),
    "mapo_paper_scale": Objective(_mapo_paper_scale_torch, _MAPO, labels="optional"),
    "sft": Objective(_sft_torch, _MAPO),
    "dpo": Objective(_dpo_torch, _DIFFUSION_DPO, reference=True, labels="optional"),
    "smpo": Objective(_smpo_torch, _DIFFUSION_DPO, reference=True, labels="required"),
    "ipo": Objective(_ipo_torch, _DIFFUSION_DPO, reference=True),
    "hinge": Objective(_hinge_torch, _DIFFUSION_DPO, reference=True),
    "kto": Objective(
        _kto_torch,
        {
            "beta": Setting(1000.0),
            "desirable_weight": Setting(1.0),
            "undesirable_weight": Setting(1.0),
        },
        reference=True,
        baseline=True,
    ),
    "dmpo": Objective(
        _dmpo_torch, {"beta": Setting(6000.0), "alpha": Setting(0.01, high=1.0)}, reference=True
    ),
    "linear_dpo": Objective(
        _linear_dpo_torch, {"beta": Setting(500.0), "eta": Setting(0.001, high=0.5)}, reference=True
    ),
    "orpo": Objective(_orpo_torch, {"beta": Setting(0.1)}, labels="optional"),
    "simpo": Objective(
        _simpo_torch, {"beta": _UNREFERENCED_BETA, "gamma": Setting(0.5, low=-math.inf)}, labels="optional"
    ),
    "cpo": Objective(
        _cpo_torch, {"beta": _UNREFERENCED_BETA, "gamma": Setting(0.0, low=-math.inf)}, labels="optional"
    ),
}


def pair_terms_torch(
    errors: Tensor,  # (2B,), chosen first; any floating dtype
    reference_errors: Tensor | None,  # (2B,)
    labels: Tensor | None,  # (B,)
    baseline: Tensor | None,  # one element
    objective: str,
    settings: list[float],
) -> _Terms:
    """Return (loss, logit, dloss/de_w, dloss/de_l), each (B,) fp64, with torch operations."""
    e = errors.double()
    r = torch.zeros_like(e) if reference_errors is None else reference_errors.double()
    e_w, e_l = e.chunk(2)
    g_w, g_l = (r - e).chunk(2)
    pair = Pairs(
        e_w,
        e_l,
        g_w,
        g_l,
        None if labels is None else labels.double(),
        None if baseline is None else baseline.double().view(()),
    )
    known = OBJECTIVES[objective]
    loss, logit, d_w, d_l = known.twin(pair, *settings[: len(known.settings)])
    if objective == "sft":
        return loss, logit, d_w, d_l
    broken = (0.0 * e + 0.0 * r).view(2, -1).sum(0)
    return loss + broken, logit, d_w + broken, d_l + broken
