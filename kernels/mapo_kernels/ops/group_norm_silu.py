"""Group normalisation and SiLU in two passes over x; backward from x and each group's mean and rstd alone.

    x̂ = (x − mean_group) · rstd_group            rstd = 1/√(variance + eps), variance biased
    z = x̂ · weight + bias                        per channel
    y = z · σ(z), or z without SiLU
    g = grad_y · σ(z) · (1 + z·(1 − σ(z)))        grad_y without SiLU
    grad_x      = rstd · (weight·g − mean_group(weight·g) − x̂ · mean_group(weight·g·x̂))
    grad_weight = Σ g·x̂,  grad_bias = Σ g        over samples and positions

Shapes. x is (N, C, …) with any number of positions S per channel, contiguous or with the channel innermost
(channels_last); both are walked where they lie and y and grad_x come in the same order.

Two passes each way (`_group_norm_kernels.py`), over regions of each sample (`_group_norm_launch.py`). Loads
are 16 bytes wide whatever the group's size, a mean far from zero costs no digits, and there are no float
atomics: results are bitwise reproducible.

Dtypes. fp16, bf16, fp32, fp64; parameters may differ from x. Arithmetic and statistics are fp32, fp64 if an
input is. y is rounded once, to x's dtype; grad_x too.

Saved for backward: x, mean and rstd (N, groups). Least traffic: forward reads x and writes y; the two passes
read x twice, 1.5 × that. Backward reads x and grad_y and writes grad_x; the two passes move 5/3 × that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapo_kernels._launch import on_device
from mapo_kernels._rows import FLOATING, accumulator
from mapo_kernels.hardware import backend
from mapo_kernels.ops._group_norm_launch import (
    Gradients,
    launch_apply,
    launch_backward,
    launch_statistics,
    ordered_like,
)

# --- The same in plain torch ---


def _to_channels(values: Tensor, x: Tensor) -> Tensor:
    """(N, groups) or (C,) values so that they broadcast against x."""
    if values.ndim == 2:
        values = values.repeat_interleave(x.shape[1] // values.shape[1], 1)
    return values.view(-1, x.shape[1], *[1] * (x.ndim - 2))


def _eager_normed(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _to_channels(mean, x)) * _to_channels(rstd, x)


def _eager_affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = normed
    if weight is not None:
        z = z * _to_channels(weight.to(z.dtype), z)
    if bias is not None:
        z = z + _to_channels(bias.to(z.dtype), z)
    return z


def _eager_apply(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> None:
    z = _eager_affine(_eager_normed(x, mean, rstd), weight, bias)
    y.copy_(torch.nn.functional.silu(z) if silu else z)


def _eager_statistics(x: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
    groups = torch.unflatten(x.to(mean.dtype), 1, (mean.shape[1], -1))
    variance, average = torch.var_mean(groups, list(range(2, groups.ndim)), correction=0)
    mean.copy_(average)
    rstd.copy_((variance + eps).rsqrt())


def _eager_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    out: Gradients,
) -> None:
    normed = _eager_normed(x, mean, rstd)
    z = _eager_affine(normed, weight, bias)
    g = grad_y.to(mean.dtype)
    if out.y is not None:
        out.y.copy_(torch.nn.functional.silu(z) if silu else z)
    if silu:
        s = z.sigmoid()
        g = g * (s * (1 + z * (1 - s)))
    outer = [0, *range(2, x.ndim)]
    if out.weight is not None:
        out.weight.copy_((g * normed).sum(outer))
    if out.bias is not None:
        out.bias.copy_(g.sum(outer))
    if out.x is not None:
        g = _eager_affine(g, weight, None)
        means = (torch.unflatten(t, 1, (mean.shape[1], -1)).flatten(2).mean(2) for t in (g, g * normed))
        mean_g, mean_gx = (_to_channels(t, x) for t in means)
        out.x.copy_((g - mean_g - normed * mean_gx) * _to_channels(rstd, x))


# --- Without autograd, for operators that contain this one ---


def group_norm_silu_forward(
    x: Tensor,  # (N, C, …), as `walkable` returns it; here and below
    num_groups: int,
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    silu: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in `out_dtype` (x's if None), and mean and rstd, (N, groups)."""
    acc = accumulator(x, weight, bias)
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    new = torch.empty if x.numel() else torch.zeros
    mean, rstd = (new(len(x), num_groups, dtype=acc, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean, rstd
    if backend(x.device).name == "eager":
        _eager_statistics(x, mean, rstd, eps)
        _eager_apply(x, y, weight, bias, mean, rstd, silu)
    else:
        with on_device(x):
            partials = launch_statistics(x, num_groups, acc)
            launch_apply(x, y, weight, bias, mean, rstd, silu, partials, eps)
    return y, mean, rstd


def group_norm_silu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return y again, from the statistics that the forward returned."""
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    if x.numel() == 0:
        return y
    if backend(x.device).name == "eager":
        _eager_apply(x, y, weight, bias, mean, rstd, silu)
    else:
        with on_device(x):
            launch_apply(x, y, weight, bias, mean, rstd, silu)
    return y


def group_norm_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    *,
    with_input: bool = True,
    with_weight: bool = True,
    with_bias: bool = True,
    with_output: bool = False,
) -> Gradients:
    """Return the gradients asked for, and y in grad_y's dtype, written by the pass that sums."""
    new = torch.empty_like if x.numel() else torch.zeros_like
    out = Gradients(
        x=new(x) if with_input else None,
        weight=new(weight) if with_weight and weight is not None else None,
        bias=new(bias) if with_bias and bias is not None else None,
        y=new(x, dtype=grad_y.dtype) if with_output else None,
    )
    if x.numel() == 0:
        return out
    grad_y = ordered_like(grad_y, x)
    if backend(x.device).name == "eager":
        _eager_backward(grad_y, x, weight, bias, mean, rstd, silu, out)
    else:
        with on_device(x):
            launch_backward(grad_y, x, weight, bias, mean, rstd, silu, out)
    return out


# --- Operators ---


@torch.library.custom_op(
    "mapo::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def _group_norm_silu_op(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_forward(x, num_groups, weight, bias, eps, silu)


@_group_norm_silu_op.register_fake
def _(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x, weight, bias)
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=acc) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op(
    "mapo::group_norm_silu_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool silu, "
    "bool with_input, bool with_weight, bool with_bias) -> Tensor[]",
)
def _group_norm_silu_backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    with_input: bool,
    with_weight: bool,
    with_bias: bool,
) -> list[Tensor]:
    gradients = group_norm_silu_backward(
        grad_y, x, weight, bias, mean, rstd, silu,
        with_input=with_input, with_weight=with_weight, with_bias=with_bias,
    )  # fmt: skip
    return [g for g in gradients if g is not None]


@_group_norm_silu_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    with_input: bool,
    with_weight: bool,
    with_bias: bool,
) -> list[Tensor]:
    wanted = ((with_input, x), (with_weight, weight), (with_bias, bias))
    return [torch.empty_like(t) for want, t in wanted if want and t is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # else zeros are made for them
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 6
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    gradients = iter(_group_norm_silu_backward_op(grad_y, *ctx.saved_tensors, ctx.silu, *needs))
    grad_x, grad_weight, grad_bias = (next(gradients) if needed else None for needed in needs)
    return grad_x, None, grad_weight, grad_bias, None, None


_group_norm_silu_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public functions ---


def walkable(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or has its channel innermost, else a contiguous copy."""
    return x if x.movedim(1, -1).is_contiguous() else x.contiguous()


def dense(parameter: Tensor | None) -> Tensor | None:
    """The (C,) parameter as the kernels walk it: contiguous."""
    return None if parameter is None else parameter.contiguous()


def check_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, prefix: str = ""
) -> None:
    """Raise ValueError or TypeError, naming the argument, where these do not fit each other."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError("x: pass a floating-point tensor of shape (N, C, ...), fp16, bf16, fp32 or fp64")
    if x.ndim < 2:
        raise ValueError(f"x: shape {tuple(x.shape)} has no channels; pass (N, C, ...)")
    if num_groups < 1 or x.shape[1] % num_groups != 0 or x.shape[1] == 0:
        raise ValueError(f"num_groups: {num_groups} groups do not divide the {x.shape[1]} channels of x")
    for name, parameter in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[1:2] or parameter.dtype not in FLOATING:
            raise ValueError(
                f"{name}: {tuple(parameter.shape)} of {parameter.dtype} does not fit x of shape "
                f"{tuple(x.shape)}; pass {x.shape[1]} floating-point numbers, or None"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name}: is on {parameter.device} but x is on {x.device}; move one of them")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:
    """SiLU of group normalisation, `F.silu(F.group_norm(x, num_groups, weight, bias, eps))`, rounded once.

    Group normalisation: Wu and He 2018, arXiv 1803.08494. Saves x and two numbers per group for backward.

    Args:
        x: (N, C, …), fp16, bf16, fp32 or fp64. Contiguous and channels_last tensors are walked where they
            lie; anything else is copied first.
        num_groups: divides C.
        weight: (C,), or None for 1; its dtype may differ from x's, its strides are any.
        bias: (C,), or None for 0.
        eps: added to the biased variance.
        silu: False for group normalisation alone.

    Returns:
        (N, C, …) in x's dtype, also under autocast, and in x's memory format.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_group_norm(x, num_groups, weight, bias)
    y: Tensor = _group_norm_silu_op(walkable(x), num_groups, dense(weight), dense(bias), float(eps), silu)[0]
    return y


class GroupNormSilu(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` followed by SiLU, with GroupNorm's arguments and state-dict keys."""

    def forward(self, input: Tensor) -> Tensor:
        """`group_norm_silu` of (N, C, …)."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)
