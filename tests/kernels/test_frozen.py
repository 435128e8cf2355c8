"""Layers with a quantised weight, against the fp64 definition and their dense twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_kernels import FrozenWeight, frozen_conv2d, frozen_linear, frozen_or_dense, group_norm_silu_conv
from mapo_kernels.reference import frozen_conv2d_reference, frozen_linear_reference
from mapo_kernels.weights import dense_weight, from_int8
from tests.kernels.linear_cases import DTYPES, quantised, same_bits
from tests.tolerances import assert_three_way

pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")
GEOMETRIES: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((3, 3), {"padding": (1, 1)}),
    ((3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    ((1, 1), {}),
    ((3, 2), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    ((2, 2), {"stride": (3, 3)}),  # some of x is never read
]


def kernel(
    device: str,
    size: tuple[int, int] = (3, 3),
    *,
    out: int = 5,
    channels: int = 8,
    groups: int = 2,
    last: bool = False,
) -> FrozenWeight:
    codes = torch.randint(-127, 128, (out, channels, *size), dtype=torch.int8)
    if last:
        codes = codes.to(memory_format=torch.channels_last)
    absmax = torch.rand(out, groups) / (channels * size[0] * size[1]) ** 0.5
    return FrozenWeight((codes.to(device), absmax.to(device)), f"int8 {out} {codes[0].numel()}")


def image(device: str, dtype: torch.dtype, last: bool = False) -> Tensor:
    x = torch.randn(2, 8, 6, 7)
    return (x.to(memory_format=torch.channels_last) if last else x).to(device, dtype).requires_grad_()


def parameter(device: str, dtype: torch.dtype, size: int = 5) -> Tensor:
    return torch.randn(size).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_codes_times_scale(device: str, groups: int, last: bool) -> None:
    codes, absmax = kernel(device, groups=groups, last=last).tensors
    want = codes.double() * absmax.double().repeat_interleave(8 // groups, 1)[:, :, None, None] / 127
    for dtype in DTYPES:
        got = from_int8(codes, absmax, dtype)
        assert got.stride() == codes.stride()
        assert float(((got - want) / want.abs().max()).abs().max()) <= torch.finfo(dtype).eps
    same = [from_int8(codes.flatten(1), absmax[:, 0], torch.float32) for _ in range(2)]
    assert torch.equal(same[0], from_int8(codes, absmax[:, :1], torch.float32).flatten(1))


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_convolution(
    device: str, dtype: torch.dtype, size: tuple[int, int], geometry: dict[str, Any], last: bool
) -> None:
    x, weight, bias = image(device, dtype, last), kernel(device, size, last=last), parameter(device, dtype)
    got = frozen_conv2d(x, weight, bias, **geometry)
    truth = frozen_conv2d_reference(x, weight, bias, **geometry)
    plain = F.conv2d(x, dense_weight(weight, dtype), bias, **geometry)
    assert got.stride() == plain.stride()
    grad = torch.randn_like(plain)
    results = [
        (y.detach(), *torch.autograd.grad(y, [x, bias], grad.to(y.dtype))) for y in (got, truth, plain)
    ]
    for name, a, b, c in zip(("y", "dx", "dbias"), *results, strict=True):
        assert_three_way(a, b.double(), c, name=name)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kind", ["nf4 nested", "int8"])
def test_linear(device: str, kind: str, dtype: torch.dtype) -> None:
    layer = quantised(kind, 64, 128, device)
    weight = frozen_or_dense(layer)
    assert isinstance(weight, FrozenWeight)
    x, bias = torch.randn(2, 3, 128).to(device, dtype).requires_grad_(), parameter(device, dtype, 64)
    got, truth = frozen_linear(x, weight, bias), frozen_linear_reference(x, weight, bias)
    plain = F.linear(x, dense_weight(weight, dtype), bias)
    grad = torch.randn_like(plain)
    results = [
        (y.detach(), *torch.autograd.grad(y, [x, bias], grad.to(y.dtype))) for y in (got, truth, plain)
    ]
    for name, a, b, c in zip(("y", "dx", "dbias"), *results, strict=True):
        assert_three_way(a, b.double(), c, name=name)
    assert torch.equal(frozen_linear(x, weight), F.linear(x, dense_weight(weight, dtype)))


def test_autocast(device: str) -> None:
    x, weight, bias = image(device, torch.float32), kernel(device), parameter(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = frozen_conv2d(x, weight, bias)
        grads = torch.autograd.grad(got.float().square().sum(), [x, bias])
    want = frozen_conv2d(x.bfloat16(), weight, bias)
    assert [got.dtype, *(g.dtype for g in grads)] == [torch.bfloat16, torch.float32, torch.float32]
    same_bits([got, *grads], [want, *torch.autograd.grad(want.float().square().sum(), [x, bias])])


def test_saves_the_codes_only(device: str) -> None:
    """torch's own convolution saves its input as well, so the test can tell."""
    weight, linear = kernel(device), frozen_or_dense(quantised("nf4 nested", 64, 128, device))
    assert isinstance(linear, FrozenWeight)
    x, rows = image(device, torch.float32), torch.randn(3, 128, device=device).requires_grad_()
    dense = dense_weight(weight, torch.float32)
    for call, given, saves_x in (
        (lambda: frozen_conv2d(x, weight), weight.tensors, False),
        (lambda: frozen_linear(rows, linear), linear.tensors, False),
        (lambda: F.conv2d(x, dense), (dense,), True),
    ):
        known = {t.untyped_storage().data_ptr() for t in given}
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=saved: (kept.append(t), t)[1], lambda t: t
        ):
            call()
        more = sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in known)
        assert more == (x.nbytes if saves_x else 0)


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_a_norm_it_is_the_dense_twin(device: str, dtype: torch.dtype, x_last: bool) -> None:
    """`group_norm_silu_conv` takes the codes, gives the same bits and saves nothing more."""
    weight, x = kernel(device), image(device, dtype, x_last)
    norm = [parameter(device, dtype, 8) for _ in range(2)]
    bias = parameter(device, dtype)
    runs, saved = [], []
    for form in (weight, dense_weight(weight, dtype)):
        given = {
            t.untyped_storage().data_ptr()
            for t in (*norm, bias, *weight.tensors, form)
            if isinstance(t, Tensor)
        }
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t
        ):
            y = group_norm_silu_conv(x, 2, *norm, form, bias)
        saved.append(sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in given))
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *norm, bias])])
    same_bits(*runs)
    assert saved[0] == saved[1] == x.nbytes + 2 * (2 * 2) * 4


def test_gradcheck(device: str) -> None:
    x, weight = image(device, torch.float64), kernel(device)
    assert torch.autograd.gradcheck(lambda x: frozen_conv2d(x, weight, stride=(2, 2)), x, fast_mode=True)


def test_bad_input() -> None:
    x, weight = torch.zeros(2, 8, 3, 3), kernel("cpu")
    for error, message, call in (
        (TypeError, "x: pass a fp16", lambda: frozen_conv2d(x.long(), weight)),
        (ValueError, "x: shape .* does not fit a weight of shape", lambda: frozen_conv2d(x[:, :4], weight)),
        (ValueError, r"bias: shape \(8,\) is not \(5,\)", lambda: frozen_conv2d(x, weight, torch.zeros(8))),
        (ValueError, "weight: is on cpu but x is on meta", lambda: frozen_conv2d(x.to("meta"), weight)),
        (
            ValueError,
            "conv_weight: .* of torch.float32 does not fit",
            lambda: group_norm_silu_conv(
                x, 2, None, None, FrozenWeight((x[:5], weight.tensors[1]), weight.format)
            ),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
