"""The terms of the objectives in `mapo_kernels.objectives`: each as a Triton function and its torch twin."""

from __future__ import annotations

import math

import torch

from mapo_kernels.terms import (
    Pairs,
    PairTerms,
    Samples,
    SampleTerms,
    Terms,
    jit,
    log_loss,
    log_loss_torch,
    log_score,
    log_score_torch,
    log_sigmoid,
    margin,
    score,
    score_torch,
    sigmoids,
    tl,
)

# --- MaPO, and its control ---


@jit
def mapo_code(e_w, e_l, r_w, r_l, label, baseline, beta, snr, timesteps):  # type: ignore[no-untyped-def]
    s_w, slope_w = score(snr * e_w)
    s_l, slope_l = score(snr * e_l)
    logit = timesteps * (s_w - s_l)
    loss, slope = log_loss(logit, label)
    pull = beta * slope * timesteps * snr
    return e_w + beta * loss, logit, 1.0 + pull * slope_w, -pull * slope_l


def mapo_code_torch(pair: Pairs, beta: float, snr: float, timesteps: float) -> PairTerms:
    s_w, slope_w = score_torch(snr * pair.e_w)
    s_l, slope_l = score_torch(snr * pair.e_l)
    logit = timesteps * (s_w - s_l)
    loss, slope = log_loss_torch(logit, pair.labels)
    pull = beta * slope * timesteps * snr
    return pair.e_w + beta * loss, logit, 1.0 + pull * slope_w, -pull * slope_l


MAPO_CODE = Terms(mapo_code, mapo_code_torch)


@jit
def mapo_paper_power(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    log_w, slope_w = log_score(e_w)
    log_l, slope_l = log_score(e_l)
    phi_w = tl.exp(beta * log_w)
    phi_l = tl.exp(beta * log_l)
    logit = phi_w - phi_l
    loss, slope = log_loss(logit, label)
    # dφ/dx = β·φ·dlog s/dx, and the β cancels the loss's 1/β
    return e_w + loss / beta, logit, 1.0 + slope * phi_w * slope_w, -slope * phi_l * slope_l


def mapo_paper_power_torch(pair: Pairs, beta: float, *_: float) -> PairTerms:
    log_w, slope_w = log_score_torch(pair.e_w)
    log_l, slope_l = log_score_torch(pair.e_l)
    phi_w, phi_l = torch.exp(beta * log_w), torch.exp(beta * log_l)
    logit = phi_w - phi_l
    loss, slope = log_loss_torch(logit, pair.labels)
    return pair.e_w + loss / beta, logit, 1.0 + slope * phi_w * slope_w, -slope * phi_l * slope_l


MAPO_PAPER_POWER = Terms(mapo_paper_power, mapo_paper_power_torch)


@jit
def mapo_paper_scale(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    s_w, slope_w = score(e_w)
    s_l, slope_l = score(e_l)
    logit = beta * (s_w - s_l)
    loss, slope = log_loss(logit, label)
    return e_w + loss / beta, logit, 1.0 + slope * slope_w, -slope * slope_l


def mapo_paper_scale_torch(pair: Pairs, beta: float, *_: float) -> PairTerms:
    s_w, slope_w = score_torch(pair.e_w)
    s_l, slope_l = score_torch(pair.e_l)
    logit = beta * (s_w - s_l)
    loss, slope = log_loss_torch(logit, pair.labels)
    return pair.e_w + loss / beta, logit, 1.0 + slope * slope_w, -slope * slope_l


MAPO_PAPER_SCALE = Terms(mapo_paper_scale, mapo_paper_scale_torch)


@jit
def sft(e_w, e_l, r_w, r_l, label, baseline, a, b, c):  # type: ignore[no-untyped-def]
    return e_w, margin(e_w, e_l, r_w, r_l), 1.0 + 0.0 * e_w, 0.0 * e_l


def sft_torch(pair: Pairs, *_: float) -> PairTerms:
    return pair.e_w, pair.margin, 1.0 + 0.0 * pair.e_w, 0.0 * pair.e_l


SFT = Terms(sft, sft_torch)


# --- Against a reference model ---


@jit
def dpo(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    u = 0.5 * beta * margin(e_w, e_l, r_w, r_l)
    loss, slope = log_loss(u, label)
    pull = 0.5 * beta * slope
    return loss, u, -pull, pull


def dpo_torch(pair: Pairs, beta: float) -> PairTerms:
    u = 0.5 * beta * pair.margin
    loss, slope = log_loss_torch(u, pair.labels)
    return loss, u, -0.5 * beta * slope, 0.5 * beta * slope


DPO = Terms(dpo, dpo_torch)


@jit
def smpo(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    rate = 5.0 * beta * (2.0 * label - 1.0)
    z = rate * margin(e_w, e_l, r_w, r_l)
    log_sigma, away = log_sigmoid(z)
    return -log_sigma, z, rate * away, -rate * away


def smpo_torch(pair: Pairs, beta: float) -> PairTerms:
    assert pair.labels is not None
    rate = 5.0 * beta * (2.0 * pair.labels - 1.0)
    loss, slope = log_loss_torch(rate * pair.margin, None)
    return loss, rate * pair.margin, -rate * slope, rate * slope


SMPO = Terms(smpo, smpo_torch)


@jit
def ipo(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    m = margin(e_w, e_l, r_w, r_l)
    miss = m - 0.5 / beta
    return miss * miss, m, -2.0 * miss, 2.0 * miss


def ipo_torch(pair: Pairs, beta: float) -> PairTerms:
    miss = pair.margin - 0.5 / beta
    return miss * miss, pair.margin, -2.0 * miss, 2.0 * miss


IPO = Terms(ipo, ipo_torch)


@jit
def hinge(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    z = beta * margin(e_w, e_l, r_w, r_l)
    pull = tl.where(z < 1.0, beta, 0.0)
    return tl.where(z < 1.0, 1.0 - z, 0.0), z, pull, -pull


def hinge_torch(pair: Pairs, beta: float) -> PairTerms:
    z = beta * pair.margin
    pull = beta * (z < 1.0).double()
    return torch.where(z < 1.0, 1.0 - z, 0.0), z, pull, -pull


HINGE = Terms(hinge, hinge_torch)


@jit
def kto(e_w, e_l, r_w, r_l, label, baseline, beta, desirable, undesirable):  # type: ignore[no-untyped-def]
    g_w = r_w - e_w
    g_l = r_l - e_l
    a = beta * (g_w - baseline)
    b = -beta * (g_l - baseline)
    sigma_a, away_a = sigmoids(a)
    sigma_b, away_b = sigmoids(b)
    loss = 0.5 * (desirable * away_a + undesirable * away_b)
    d_w = 0.5 * desirable * beta * sigma_a * away_a
    d_l = -0.5 * undesirable * beta * sigma_b * away_b
    return loss, beta * (g_w - g_l), d_w, d_l


def kto_torch(pair: Pairs, beta: float, desirable: float, undesirable: float) -> PairTerms:
    assert pair.baseline is not None
    a, b = beta * (pair.g_w - pair.baseline), -beta * (pair.g_l - pair.baseline)
    loss = 0.5 * (desirable * torch.sigmoid(-a) + undesirable * torch.sigmoid(-b))
    d_w = 0.5 * desirable * beta * torch.sigmoid(a) * torch.sigmoid(-a)
    d_l = -0.5 * undesirable * beta * torch.sigmoid(b) * torch.sigmoid(-b)
    return loss, beta * pair.margin, d_w, d_l


KTO = Terms(kto, kto_torch)


def kto_single(sample: Samples, beta: float, desirable: float, undesirable: float) -> SampleTerms:
    assert sample.baseline is not None
    distance = beta * (sample.gains - sample.baseline)
    z = torch.where(sample.wanted, distance, -distance)
    away = torch.sigmoid(-z)
    return torch.where(sample.wanted, desirable * away, undesirable * away), z


@jit
def dmpo(e_w, e_l, r_w, r_l, label, baseline, beta, alpha, c):  # type: ignore[no-untyped-def]
    u = 0.5 * beta * margin(e_w, e_l, r_w, r_l)
    log_sigma, away = log_sigmoid(u)
    log_away, sigma = log_sigmoid(-u)
    log_keep = tl.log(1.0 - alpha)
    log_flip = tl.log(alpha)
    loss = sigma * (log_sigma - log_keep) + away * (log_away - log_flip)
    pull = 0.5 * beta * sigma * away * (u - log_keep + log_flip)
    return loss, u, -pull, pull


def dmpo_torch(pair: Pairs, beta: float, alpha: float) -> PairTerms:
    u = 0.5 * beta * pair.margin
    sigma, away = torch.sigmoid(u), torch.sigmoid(-u)
    log_sigma, log_away = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
    log_keep, log_flip = math.log(1.0 - alpha), math.log(alpha)
    loss = sigma * (log_sigma - log_keep) + away * (log_away - log_flip)
    pull = 0.5 * beta * sigma * away * (u - log_keep + log_flip)
    return loss, u, -pull, pull


DMPO = Terms(dmpo, dmpo_torch)


@jit
def linear_dpo(e_w, e_l, r_w, r_l, label, baseline, beta, eta, c):  # type: ignore[no-untyped-def]
    z = 0.2 * beta * margin(e_w, e_l, r_w, r_l)
    strength = tl.minimum(tl.maximum(0.5 - z, eta), 1.0 - eta)
    return strength * (e_w - e_l), z, strength, -strength


def linear_dpo_torch(pair: Pairs, beta: float, eta: float) -> PairTerms:
    z = 0.2 * beta * pair.margin
    strength = (0.5 - z).clamp(eta, 1.0 - eta)
    return strength * (pair.e_w - pair.e_l), z, strength, -strength


LINEAR_DPO = Terms(linear_dpo, linear_dpo_torch)


# --- Without one ---


@jit
def orpo(e_w, e_l, r_w, r_l, label, baseline, beta, b, c):  # type: ignore[no-untyped-def]
    m = margin(e_w, e_l, r_w, r_l)
    loss, slope = log_loss(m, label)
    return e_w + beta * loss, m, 1.0 - beta * slope, beta * slope


def orpo_torch(pair: Pairs, beta: float) -> PairTerms:
    loss, slope = log_loss_torch(pair.margin, pair.labels)
    return pair.e_w + beta * loss, pair.margin, 1.0 - beta * slope, beta * slope


ORPO = Terms(orpo, orpo_torch)


@jit
def simpo(e_w, e_l, r_w, r_l, label, baseline, beta, gamma, c):  # type: ignore[no-untyped-def]
    z = beta * margin(e_w, e_l, r_w, r_l) - gamma
    loss, slope = log_loss(z, label)
    return loss, z, -beta * slope, beta * slope


def simpo_torch(pair: Pairs, beta: float, gamma: float) -> PairTerms:
    z = beta * pair.margin - gamma
    loss, slope = log_loss_torch(z, pair.labels)
    return loss, z, -beta * slope, beta * slope


SIMPO = Terms(simpo, simpo_torch)


@jit
def cpo(e_w, e_l, r_w, r_l, label, baseline, beta, gamma, c):  # type: ignore[no-untyped-def]
    loss, z, d_w, d_l = simpo(e_w, e_l, r_w, r_l, label, baseline, beta, gamma, c)
    return e_w + loss, z, 1.0 + d_w, d_l


def cpo_torch(pair: Pairs, beta: float, gamma: float) -> PairTerms:
    loss, z, d_w, d_l = simpo_torch(pair, beta, gamma)
    return pair.e_w + loss, z, 1.0 + d_w, d_l


CPO = Terms(cpo, cpo_torch)
