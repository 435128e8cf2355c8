"""One linear layer as an operator: what `lora_linear`, `frozen_linear` and `fp8_linear` are made of.

The formula is in `_projections.py`: y (…, N) of x (…, C) for a projection whose weight is dense,
quantised or rounded to fp8, with or without an adapter. Saved for backward: t, and x if a weight or A trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels._autocast import autocast_off
from mapo_kernels.ops._projection_ops import differentiate, empty_gradients, empty_outputs
from mapo_kernels.ops._projections import (
    Projection,
    check_input,
    check_projection,
    input_gradients,
    needs,
    pack,
    parameter_gradients,
    product_dtype,
    project,
    unpack,
)


@torch.library.custom_op(
    "mapo::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, str[] formats, float[] scales) -> (Tensor, Tensor)",
)
def linear_op(
    x: Tensor, tensors: list[Tensor], formats: list[str], scales: list[float]
) -> tuple[Tensor, Tensor]:
    """Return y and t, in x's dtype."""
    with autocast_off(x.device):
        y, t = project(x.reshape(-1, x.shape[-1]), unpack(tensors, formats, scales))
    return y.view(*x.shape[:-1], y.shape[1]), t


@linear_op.register_fake
def _(x: Tensor, tensors: list[Tensor], formats: list[str], scales: list[float]) -> tuple[Tensor, Tensor]:
    return empty_outputs(x, x.dtype, tensors, formats, scales)


@torch.library.custom_op(
    "mapo::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? x, Tensor t, Tensor[] tensors, str[] formats, float[] scales, "
    "bool[] needed) -> Tensor[]",
)
def linear_backward_op(
    grad: Tensor,
    x: Tensor | None,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],  # x, then one per tensor
) -> list[Tensor]:
    """Return the gradients that are needed."""
    of_x, *of_tensors = needed
    with_dt = needs(of_tensors, formats, "a")
    with autocast_off(grad.device):
        dy = [grad.reshape(-1, grad.shape[-1])]
        dx, dt = input_gradients(dy, unpack(tensors, formats, scales), with_dn=of_x, with_dt=with_dt)
        n = None if x is None else x.reshape(-1, x.shape[-1])
        found = parameter_gradients(of_tensors, dy, tensors, formats, scales, n, t, dt)
    return found if dx is None else [dx.view(*grad.shape[:-1], dx.shape[1]), *found]


@linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    t: Tensor,
    tensors: list[Tensor],
    formats: list[str],
    scales: list[float],
    needed: list[bool],
) -> list[Tensor]:
    features = unpack(tensors, formats, scales)[0].weight.shape[1]
    return empty_gradients([grad.new_empty((*grad.shape[:-1], features)), *tensors], needed)


def _trains(tensors: list[Tensor], formats: list[str]) -> bool:
    return needs([tensor.requires_grad for tensor in tensors], formats, "weight", "a")


differentiate(linear_op, linear_backward_op, keeps_input=_trains)


def linear(x: Tensor, projection: Projection) -> Tensor:
    """The projection of x (…, C), (…, N) in x's dtype or autocast's.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_input("x", x, "(…, C)")
    check_projection("projection", projection, x.shape[-1], x)
    y: Tensor = linear_op(x.to(product_dtype(x)), *pack([projection]))[0]
    return y
