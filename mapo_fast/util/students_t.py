"""Quantiles of Student's t distribution, from its closed form for whole degrees of freedom.

Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: with θ = atan(t/√ν),

    ν odd   P(|T| ≤ t) = 2/π · (θ + sin θ · (cos θ + 2/3 cos³θ + … + 2·4·…·(ν−3) / (3·5·…·(ν−2)) cosᵛ⁻²θ))
    ν even  P(|T| ≤ t) = sin θ · (1 + 1/2 cos²θ + … + 1·3·…·(ν−3) / (2·4·…·(ν−2)) cosᵛ⁻²θ)
"""

from __future__ import annotations

import math
from statistics import NormalDist


def half_width(level: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = `level` for `freedom` degrees of freedom, to 13 digits; takes O(freedom)."""
    if not 0 < level < 1 or freedom < 1:
        raise ValueError(f"level {level} has to be between 0 and 1, freedom {freedom} at least 1")
    t = NormalDist().inv_cdf((1 + level) / 2)
    # The normal quantile is the smaller one and P is concave: Newton's steps go up, until rounding ends them.
    while (closer := t + (level - _within(t, freedom)) / (2 * _density(t, freedom))) > t * (1 + 1e-15):
        t = closer
    return t


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t)."""
    odd = freedom % 2
    sine = t / math.sqrt(freedom + t * t)
    decay = math.log1p(t * t / freedom)  # −log cos²θ; a power of a rounded cos θ would lose digits
    terms, factor = [], 1.0
    for k in range(freedom // 2):
        terms.append(factor * math.exp(-(k + odd / 2) * decay))
        factor *= (2 * k + 1 + odd) / (2 * k + 2 + odd)
    total = sine * math.fsum(terms)
    return 2 / math.pi * (math.atan(t / math.sqrt(freedom)) + total) if odd else total


def _density(t: float, freedom: int) -> float:
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return math.exp(scale - (freedom + 1) / 2 * math.log1p(t * t / freedom)) / math.sqrt(freedom * math.pi)
