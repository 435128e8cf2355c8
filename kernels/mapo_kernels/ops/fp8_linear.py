"""A linear layer that trains, multiplied in fp8 where its weight's own gradient is not concerned.

    y  = round(x) round(W)ᵀ + bias        dx = round(dy · s) C        round(W) = diag(s) C, see fp8.py
    dW = dyᵀ x                            dbias = Σ_rows dy

Of the three products two are in fp8; dW, the sum over all tokens that the optimizer sees, is in x's dtype.
These are the operands of torchao's recipe `rowwise_with_gw_hp`, its most accurate, except that dx has W's
scales by row instead of one for all.

Shapes: x (…, C), W (N, C), bias (N,), y (…, N). Saved for backward: x. W is rounded in forward and again in
backward, never saved.
"""

from __future__ import annotations

from torch import Tensor

from mapo_kernels.ops._linear import linear
from mapo_kernels.ops._projections import Projection


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias with both rounded to fp8, saving x.

    Args:
        x: (…, C), fp16, bf16, fp32 or fp64. Under autocast it is cast to autocast's dtype.
        weight: (N, C) in x's dtype; in any floating dtype under autocast, and rounded from that.
        bias: (N,) in the weight's dtype, or None.

    Returns:
        (…, N) in x's dtype, or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    return linear(x, Projection(weight, bias, fp8=True))
