"""The operators' definitions in fp64, in plain torch and differentiated by autograd: slow, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mapo_kernels.ops._pair_reference import paired_loss_reference
from mapo_kernels.ops._projections import Lora, Projection
from mapo_kernels.ops.paired_noise import paired_noise_reference
from mapo_kernels.weights import FrozenWeight, dense_weight

__all__ = [
    "adamw8bit_reference",
    "add_rounded_reference",
    "frozen_conv2d_reference",
    "frozen_linear_reference",
    "geglu_linear_reference",
    "geglu_reference",
    "group_norm_silu_conv_reference",
    "group_norm_silu_reference",
    "layer_norm_linear_reference",
    "layer_norm_reference",
    "lora_linear_reference",
    "paired_loss_reference",
    "paired_noise_reference",
    "projection_reference",
]


# --- Normalisation and GEGLU ---


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:
    """The definition of `group_norm_silu`, in fp64 throughout and differentiated by autograd. For tests."""
    groups = torch.unflatten(x.double(), 1, (num_groups, -1)).flatten(2)
    centred = groups - groups.mean(2, keepdim=True)
    variance = (centred**2).mean(2, keepdim=True)
    z = (centred / (variance + eps).sqrt()).view(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    if weight is not None:
        z = z * weight.double().view(shape)
    if bias is not None:
        z = z + bias.double().view(shape)
    y: Tensor = z * torch.sigmoid(z) if silu else z
    return y


def group_norm_silu_conv_reference(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv_weight: Tensor | FrozenWeight,
    conv_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The definition of `group_norm_silu_conv`, in fp64 throughout. For tests."""
    y = group_norm_silu_reference(x, num_groups, norm_weight, norm_bias, eps)
    bias = None if conv_bias is None else conv_bias.double()
    weight = dense_weight(conv_weight, torch.float64)
    return torch.nn.functional.conv2d(y, weight, bias, stride, padding, dilation)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `layer_norm`, in fp64 and differentiated by autograd. Slow; for tests."""
    s = x.double()
    if residual is not None:
        exact = s + residual.double()
        s = (
            exact + (exact.to(x.dtype).double() - exact).detach()
        )  # rounded, with the gradient of the exact sum
    centred = s - s.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y if residual is None else (y, s)


def layer_norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projections: Sequence[Projection],
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The definition in fp64, differentiated by autograd: (outputs, x + residual)."""
    s = x.double() if residual is None else x.double() + residual.double()
    weight, bias = (None if p is None else p.double() for p in (norm_weight, norm_bias))
    n = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return tuple(projection_reference(n, projection) for projection in projections), s


def geglu_reference(projected: Tensor) -> Tensor:
    """The definition of `geglu`, in fp64 and differentiated by autograd. Slow; for tests."""
    value, gate = projected.double().chunk(2, dim=-1)
    return value * (gate * (1 + torch.erf(gate / math.sqrt(2))) / 2)


def geglu_linear_reference(projected: Tensor, projection: Projection) -> Tensor:
    """The definition in fp64, differentiated by autograd."""
    return projection_reference(geglu_reference(projected), projection)


# --- Linear layers and a convolution ---


def projection_reference(n: Tensor, projection: Projection) -> Tensor:
    """One projection of n in fp64, differentiated by autograd."""
    weight, bias, lora, _ = projection
    y = F.linear(n, dense_weight(weight, torch.float64), None if bias is None else bias.double())
    return y if lora is None else y + lora.scale * F.linear(F.linear(n, lora.a.double()), lora.b.double())


def lora_linear_reference(
    x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The definition in fp64, differentiated by autograd."""
    return projection_reference(x.double(), Projection(weight, bias, Lora(a, b, scale)))


def frozen_linear_reference(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """The definition in fp64, differentiated by autograd. For tests."""
    return F.linear(x.double(), dense_weight(weight, torch.float64), None if bias is None else bias.double())


def frozen_conv2d_reference(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None = None, **geometry: Any
) -> Tensor:
    """The definition in fp64, differentiated by autograd. For tests."""
    return F.conv2d(
        x.double(),
        dense_weight(weight, torch.float64),
        None if bias is None else bias.double(),
        **geometry,
    )


# --- The optimizer and sums ---


def adamw8bit_reference(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: float = 1.0,
    max_update_rms: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of a tensor's step `step` (from 1), in fp64 and without any rounding; for tests.

    Returns:
        The new parameter and moments, fp64.
    """
    g = grad.double() / grad_scale
    m = betas[0] * m.double() + (1 - betas[0]) * g
    v = betas[1] * v.double() + (1 - betas[1]) * g**2
    update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    rms = update.square().mean().sqrt()
    if max_update_rms is not None and rms > max_update_rms:
        update = update * (max_update_rms / rms)
    return param.double() * (1 - lr * weight_decay) - lr * update, m, v


def add_rounded_reference(total: Tensor, summand: Tensor) -> Tensor:
    """The exact sum, fp64: what the rounded one is on average."""
    return total.double() + summand.double()
