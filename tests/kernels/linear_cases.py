"""What the tests of the operators with a matrix product share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mapo_kernels import Lora, Projection
from mapo_kernels.weights import FrozenWeight, dense_weight, frozen_or_dense
from tests.tolerances import assert_three_way

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
QUANTISED = ["nf4", "nf4 nested", "fp4", "int8"]

COMPILER_WARNS = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
"""What torch 2.13's compiler says about its own code, the second where it traces an autograd.Function."""


def leaf(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0, grad: bool = True) -> Tensor:
    return (scale * torch.randn(shape)).to(device, dtype).requires_grad_(grad)


def projection(
    out: int,
    features: int,
    device: str,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    rank: int = 0,
    factors: torch.dtype | None = None,
    trainable: bool = True,
) -> Projection:
    """Weights of the size that layers have: outputs as large as the inputs, adapters a good part of them."""

    def new(*shape: int, fan_in: int, kind: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return leaf(*shape, device=device, dtype=kind, scale=fan_in**-0.5, grad=grad)

    lora = None
    if rank:
        kind = factors or dtype
        lora = Lora(
            new(rank, features, fan_in=features, kind=kind), new(out, rank, fan_in=rank, kind=kind), 0.7
        )
    return Projection(
        new(out, features, fan_in=features, grad=trainable),
        new(out, fan_in=features, grad=trainable) if bias else None,
        lora,
    )


def quantised(
    kind: str, out: int, features: int, device: str, stored: torch.dtype = torch.float32
) -> nn.Module:
    """A linear layer of bitsandbytes with a bias."""
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(features, out, has_fp16_weights=False)
    else:
        name, *nested = kind.split()
        layer = bnb.nn.Linear4bit(features, out, quant_type=name, compress_statistics=bool(nested)).to(stored)
    return layer.to(device).requires_grad_(False)


def plain(n: Tensor, projection: Projection) -> Tensor:
    """What one writes by hand, as peft does: the adapter in its factors' dtype, rounded to the base's."""
    weight, bias, lora, _ = projection
    y = F.linear(n, dense_weight(weight, n.dtype) if isinstance(weight, FrozenWeight) else weight, bias)
    if lora is None:
        return y
    return (y + F.linear(F.linear(n.to(lora.a.dtype), lora.a), lora.b) * lora.scale).to(y.dtype)


def leaves(*items: Any) -> list[Tensor]:
    """The tensors that want a gradient, in projections and outside of them."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found += [item] if item.requires_grad else []
        elif isinstance(item, (tuple, list)):
            found += leaves(*item)
    return found


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    return list(
        torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    )


def check(
    got: Callable[[], Sequence[Tensor]],
    truth: Callable[[], Sequence[Tensor]],  # fp64
    eager: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    arithmetic: torch.dtype | None = None,  # what the products are computed in, if not the leaves' dtype
    ulps: float = 2.0,
) -> None:
    """Outputs and every gradient by the three-way rule."""
    ours, exact, theirs = got(), truth(), eager()
    grads = [torch.randn_like(y).to(y.dtype) for y in theirs]
    results = zip(
        [*ours, *gradients(ours, inputs, grads)],
        [*exact, *gradients(exact, inputs, grads)],
        [*theirs, *gradients(theirs, inputs, grads)],
        strict=True,
    )
    for i, (a, b, c) in enumerate(results):
        assert a.dtype == c.dtype
        a, c = (x.detach().to(arithmetic or x.dtype) for x in (a, c))
        assert_three_way(a, b.detach().double(), c, ulps=ulps, name=f"result {i} of shape {tuple(a.shape)}")


def same_bits(results: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for a, b in zip(results, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def dequantised(projection: Projection, dtype: torch.dtype) -> Projection:
    """The projection with its quantised weight as a plain tensor."""
    return projection._replace(weight=dense_weight(projection.weight, dtype))


def frozen_projection(kind: str, out: int, features: int, device: str, dtype: torch.dtype) -> Projection:
    """A quantised weight with a bias and an adapter."""
    layer = quantised(kind, out, features, device)
    _, bias, lora, _ = projection(out, features, device, dtype, rank=3, trainable=False)
    return Projection(frozen_or_dense(layer), bias, lora)


def matrix_flops(op: Any, *args: Any) -> int:
    """Arithmetic of the matrix products in an operator's body (2 per multiply-add)."""

    def accumulated(total: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * int(a[0] * a[1] * b[1])

    more = {torch.ops.aten.addmm_: accumulated}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=more) as counter:
        op._init_fn(*args)
    return counter.get_total_flops()
