"""LoRA linear layer: a frozen projection and its low-rank adapter in one operator.

    t  = x Aᵀ                                   y  = x Wᵀ + bias + scale · t Bᵀ
    dt = scale · dy B                           dx = dy W + dt A
    dA = dtᵀ x     dB = scale · dyᵀ t           dW = dyᵀ x     dbias = Σ_rows dy, where asked for

Shapes: x (…, C), W (N, C), bias (N,), A (r, C), B (N, r), y (…, N). W is dense, or quantised by bitsandbytes
(nf4, fp4, int8) and then dequantised inside the operator, forward and backward.

Dtypes. The products are in x's dtype, or autocast's. Factors may be fp32 with a bf16 x: they are cast, x is
not, where peft makes and saves an fp32 copy of x. Gradients have their parameter's dtype.

Saved for backward: x and t; without a gradient for W and A only t. Least traffic: what the linear layer reads
and writes, and in forward one more read of x, M·r written and read, and y read and written once more.

Source: Hu et al., LoRA (arXiv 2106.09685); peft's `lora.Linear` without dropout.
"""

from __future__ import annotations

from torch import Tensor

from mapo_kernels.ops._linear import linear
from mapo_kernels.ops._projections import Lora, Projection
from mapo_kernels.weights import FrozenWeight


def lora_linear(
    x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, saving x and the rank-r product only.

    Args:
        x: (…, C), fp16, bf16, fp32 or fp64, any strides. Under autocast it is cast to autocast's dtype.
        weight: (N, C) in x's dtype (any floating dtype under autocast), usually frozen; or what
            `frozen_or_dense` returns for a layer that bitsandbytes has quantised.
        bias: (N,) in the weight's dtype, or None.
        a: (r, C) factor in any floating dtype; fp32 factors with a bf16 x are usual.
        b: (N, r) factor.
        scale: alpha / r.

    Returns:
        (…, N) in x's dtype, or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    return linear(x, Projection(weight, bias, Lora(a, b, scale)))
