"""`layer_norm_linear` against its fp64 definition and plain PyTorch.

This file runs in every implementation: see conftest.py.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mapo_kernels.ops import _projections
from mapo_kernels.ops._projections import Lora, Projection, pack
from mapo_kernels.ops.layer_norm_linear import layer_norm_linear
from mapo_kernels.reference import layer_norm_linear_reference
from mapo_kernels.weights import frozen_or_dense, join_weights
from tests.kernels.linear_cases import (
    COMPILER_WARNS,
    DTYPES,
    HALF,
    check,
    dequantised,
    frozen_projection,
    gradients,
    leaf,
    leaves,
    matrix_flops,
    plain,
    projection,
    quantised,
    same_bits,
)
from tests.saved import compiled, saved_bytes

op = sys.modules["mapo_kernels.ops.layer_norm_linear"]
pytestmark = [pytest.mark.usefixtures("_nan_in_fresh_memory"), *COMPILER_WARNS]

Norm = tuple[Tensor | None, Tensor | None]


def norm(features: int, device: str, dtype: torch.dtype, trainable: bool = True) -> Norm:
    weight = (1 + 0.3 * torch.randn(features)).to(device, dtype).requires_grad_(trainable)
    return weight, leaf(features, device=device, dtype=dtype, grad=trainable)


def joined(
    sizes: Sequence[int], features: int, device: str, dtype: torch.dtype, **options: Any
) -> list[Projection]:
    """Projections whose weights are Parameters in one matrix."""
    projections = [projection(n, features, device, dtype, **options) for n in sizes]
    weights = [nn.Parameter(p.weight.detach(), p.weight.requires_grad) for p in projections]  # type: ignore[union-attr]
    join_weights(weights)
    return [p._replace(weight=w) for p, w in zip(projections, weights, strict=True)]


def apply(x: Tensor, n: Norm, projections: list[Projection], residual: Tensor | None = None) -> list[Tensor]:
    """Outputs, and x + residual."""
    if residual is None:
        return list(layer_norm_linear(x, *n, projections, 1e-5))
    outputs, total = layer_norm_linear(x, *n, projections, 1e-5, residual=residual)
    return [*outputs, total]


def reference(x: Tensor, n: Norm, projections: list[Projection], residual: Tensor | None) -> list[Tensor]:
    outputs, total = layer_norm_linear_reference(x, *n, projections, 1e-5, residual=residual)
    return list(outputs) if residual is None else [*outputs, total]


def by_hand(x: Tensor, n: Norm, projections: list[Projection], residual: Tensor | None) -> list[Tensor]:
    total = x if residual is None else x + residual
    parameters = [None if p is None else p.to(x.dtype) for p in n]
    normed = F.layer_norm(total, x.shape[-1:], *parameters, eps=1e-5)
    outputs = [plain(normed, p) for p in projections]
    return outputs if residual is None else [*outputs, total]


def check_layer(
    x: Tensor, n: Norm, projections: list[Projection], residual: Tensor | None = None, **options: Any
) -> None:
    args = (x, n, projections, residual)
    check(lambda: apply(*args), lambda: reference(*args), lambda: by_hand(*args), leaves(*args), **options)


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(device: str, dtype: torch.dtype, trainable: bool, with_residual: bool) -> None:
    """q, k and v as rows of one matrix, without biases: SDXL's self-attention."""
    x = leaf(2, 37, 80, device=device, dtype=dtype)
    residual = leaf(2, 37, 80, device=device, dtype=dtype) if with_residual else None
    projections = joined([48, 48, 48], 80, device, dtype, bias=False, trainable=trainable)
    check_layer(x, norm(80, device, dtype, trainable), projections, residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_projection_with_bias(device: str, dtype: torch.dtype) -> None:
    x, residual = (leaf(2, 37, 80, device=device, dtype=dtype) for _ in range(2))
    check_layer(x, norm(80, device, dtype), [projection(48, 80, device, dtype)], residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_on_one_matrix(device: str, dtype: torch.dtype) -> None:
    """All, some and different ranks of adapters; a bias on one projection of three."""
    x = leaf(2, 37, 80, device=device, dtype=dtype)
    projections = joined([48, 32, 48], 80, device, dtype, rank=8, trainable=False)
    projections[0] = projections[0]._replace(bias=None)
    projections[2] = projections[2]._replace(bias=None)
    check_layer(x, norm(80, device, dtype, trainable=False), projections)
    projections[1] = projections[1]._replace(lora=None)
    projections[2] = projections[2]._replace(lora=projection(48, 80, device, dtype, rank=3).lora)
    check_layer(x, norm(80, device, dtype), projections)


@pytest.mark.parametrize("dtype", HALF)
def test_fp32_norm_and_factors_beside_half_precision(device: str, dtype: torch.dtype) -> None:
    """Judged in half precision, which the products are computed in; gradients are fp32 as the parameters."""
    x, residual = (leaf(2, 37, 80, device=device, dtype=dtype) for _ in range(2))
    projections = joined([48, 48], 80, device, dtype, rank=8, factors=torch.float32, trainable=False)
    n = norm(80, device, torch.float32)
    check_layer(x, n, projections, residual, arithmetic=dtype)
    outputs = apply(x, n, projections, residual)
    found = gradients(outputs, leaves(x, n, projections), outputs)
    assert [g.dtype for g in found] == [dtype] + 6 * [torch.float32]


def test_projections_of_different_kinds(device: str) -> None:
    """A trainable weight, a frozen one with an adapter and two quantised ones cannot be one product."""
    x, residual = (leaf(2, 9, 128, device=device, dtype=torch.float32) for _ in range(2))
    projections = [
        projection(48, 128, device, torch.float32),
        projection(32, 128, device, torch.float32, rank=4, trainable=False, bias=False),
        frozen_projection("nf4 nested", 32, 128, device, torch.float32),
        frozen_projection("int8", 48, 128, device, torch.float32)._replace(lora=None),
    ]
    n = norm(128, device, torch.float32)
    check_layer(x, n, projections, residual)
    dense = [dequantised(p, torch.float32) for p in projections]
    inputs = leaves(x, n, projections, residual)
    runs = []
    for outputs in (apply(x, n, projections, residual), apply(x, n, dense, residual)):
        runs.append([*outputs, *gradients(outputs, inputs, [y.detach() for y in outputs])])
    same_bits(*runs)


@pytest.mark.parametrize("shape", [(7,), (1, 1), (0, 7), (2, 0, 3, 7), (13, 7), (2, 3, 5, 7)])
def test_any_shape(device: str, shape: tuple[int, ...]) -> None:
    x, residual = (leaf(*shape, device=device, dtype=torch.float32) for _ in range(2))
    projections = [projection(n, shape[-1], device, torch.float32, rank=3) for n in (11, 5)]
    outputs = apply(x, norm(shape[-1], device, torch.float32), projections, residual)
    assert [y.shape[:-1] for y in outputs] == 3 * [x.shape[:-1]]
    check_layer(x, norm(shape[-1], device, torch.float32), projections, residual)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(rows=st.integers(0, 70), features=st.integers(8, 40), out=st.integers(1, 40), rank=st.integers(0, 9))
def test_hypothesis_shapes(rows: int, features: int, out: int, rank: int) -> None:
    """Not fewer than 8 features: the gradient of a norm over 2 is a difference that cancels to rounding."""
    x = leaf(rows, features, device="cpu", dtype=torch.float32)
    projections = joined([out, out + 1], features, "cpu", torch.float32, rank=rank)
    check_layer(x, norm(features, "cpu", torch.float32), projections)


def test_without_norm_parameters(device: str) -> None:
    x = leaf(2, 9, 80, device=device, dtype=torch.float32)
    weight, bias = norm(80, device, torch.float32)
    for n in ((None, None), (weight, None), (None, bias)):
        check_layer(x, n, [projection(48, 80, device, torch.float32)])


def test_gradcheck(device: str) -> None:
    x, residual = (leaf(2, 5, device=device, dtype=torch.float64) for _ in range(2))
    q, k = joined([3, 2], 5, device, torch.float64, rank=2)
    n = norm(5, device, torch.float64)
    assert q.lora is not None

    def flat(x: Tensor, residual: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weight, bias, lora_a, lora_b, other = rest
        lora = Lora(lora_a, lora_b, 0.7)
        return tuple(apply(x, (w, b), [Projection(weight, bias, lora), k._replace(weight=other)], residual))

    inputs = (x, residual, *n, q.weight, q.bias, q.lora.a, q.lora.b, k.weight)
    assert torch.autograd.gradcheck(flat, inputs)
    assert torch.autograd.gradcheck(lambda x, w, b: tuple(reference(x, (w, b), [q, k], None)), (x, *n))


def test_outputs_are_views_of_one_tensor(device: str) -> None:
    """And the gradient of an output that is not used is zero."""
    x = leaf(2, 9, 80, device=device, dtype=torch.float32)
    q, k, v = projections = joined([48, 32, 16], 80, device, torch.float32, bias=False)
    n = norm(80, device, torch.float32)
    outputs = apply(x, n, projections)
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1
    assert [y.storage_offset() for y in outputs] == [0, 48, 80]
    assert {y.stride(-2) for y in outputs} == {96}
    used, *unused = gradients([outputs[1]], [k.weight, q.weight, v.weight], [outputs[1].detach()])  # type: ignore[list-item]
    assert used.abs().sum() > 0
    assert not any(g.any() for g in unused)


def test_one_gradient_for_both_summands(device: str) -> None:
    x, residual = (leaf(2, 9, 80, device=device, dtype=torch.float32) for _ in range(2))
    n, projections = norm(80, device, torch.float32), [projection(48, 80, device, torch.float32)]
    outputs = apply(x, n, projections, residual)
    assert torch.equal(outputs[-1], x + residual)
    of_x, of_residual = gradients(outputs, [x, residual], [y.detach() for y in outputs])
    assert torch.equal(of_x, of_residual)
    outputs = apply(x, n, projections, residual.detach())
    (alone,) = gradients(outputs, [x], [y.detach() for y in outputs])
    assert torch.equal(alone, of_x)
    wide = residual.detach().double().requires_grad_()
    (alone,) = gradients([apply(x.detach(), n, projections, wide)[0]], [wide], [outputs[0].detach()])
    assert alone.dtype == torch.float64


# --- Only what is needed ---


def test_one_product_forward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are rows of one matrix are one product; others are one product each."""
    linear = mock.Mock(wraps=F.linear)
    mm = mock.Mock(wraps=torch.mm)
    monkeypatch.setattr(_projections.F, "linear", linear)
    monkeypatch.setattr(_projections.torch, "mm", mm)
    x = leaf(2, 9, 80, device=device, dtype=torch.float32)
    projections = joined([48, 32, 16], 80, device, torch.float32, bias=False)
    apply(x, (None, None), projections)
    assert (linear.call_count, mm.call_count) == (1, 0)
    assert linear.call_args.args[1].shape == (96, 80)
    apply(x, (None, None), projections[::2])
    assert (linear.call_count, mm.call_count) == (1, 2)


WANTED = [w for w in itertools.product([False, True], repeat=6) if sum(w) in (0, 1, 2, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", WANTED)
def test_only_needed_gradients(
    device: str, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is the same whatever else is frozen; nothing is computed twice, or for nobody."""
    rows, features, out, rank = 12, 8, 6, 2
    x = leaf(rows, features, device=device, dtype=torch.float64)
    n = norm(features, device, torch.float64)
    assert n[0] is not None
    n = (n[0], n[1].detach())  # type: ignore[union-attr]
    projections = joined([out, out], features, device, torch.float64, bias=False)
    lora = projection(out, features, device, torch.float64, rank=rank).lora
    projections[1] = projections[1]._replace(lora=lora)
    inputs = leaves(x, n, projections)
    outputs = apply(x, n, projections)
    grads = [y.detach() for y in outputs]
    every = dict(zip(map(id, inputs), gradients(outputs, inputs, grads), strict=True))
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    if any(wanted):
        outputs = apply(x, n, projections)
        some = leaves(x, n, projections)
        for tensor, got in zip(some, gradients(outputs, some, grads), strict=True):
            torch.testing.assert_close(got, every[id(tensor)], rtol=1e-12, atol=1e-12)

    of_x, of_norm, of_first, of_second, of_a, of_b = wanted
    through_norm = of_x or of_norm
    products = through_norm * (2 * out + rank) * features + (of_first + of_second) * out * features
    products += (through_norm or of_a) * out * rank + of_a * rank * features + of_b * out * rank
    packed = pack(projections)
    y, t, mean, rstd = op._layer_norm_linear_op(x.detach(), None, *n, 1e-5, torch.float64, *packed)
    again, backward = (mock.Mock(wraps=f) for f in (op.layer_norm_apply, op.layer_norm_backward))
    monkeypatch.setattr(op, "layer_norm_apply", again)
    monkeypatch.setattr(op, "layer_norm_backward", backward)
    needed = [of_x, of_norm, False, *wanted[2:]]
    args = (list(y.detach().chunk(2, -1)), None, x, *n, mean, rstd, t, *packed, needed)
    assert matrix_flops(op._layer_norm_linear_backward_op, *args) == 2 * rows * products
    with_n = of_first or of_second or of_a
    asked = {"grad_sum": None, "with_output": with_n, "with_params": of_norm}
    assert [call.kwargs for call in backward.call_args_list] == [asked] * through_norm
    assert again.call_count == (with_n and not through_norm)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_saves_what_is_normalised_and_statistics(device: str, with_residual: bool, compile: bool) -> None:
    x, residual = (leaf(64, 80, device=device, dtype=torch.bfloat16) for _ in range(2))
    n = norm(80, device, torch.bfloat16)
    for rank in (0, 4):
        projections = joined([48, 48, 48], 80, device, torch.bfloat16, rank=rank, bias=False)

        def layer(x: Tensor, residual: Tensor, projections: list[Projection] = projections) -> list[Tensor]:
            return apply(x * 2, n, projections, residual if with_residual else None)

        step = compiled(layer) if compile else layer
        besides = leaves(x, residual, n, projections)
        got = saved_bytes(lambda f=step: f(x, residual), besides=besides)
        assert got == 2 * 64 * (80 + 3 * rank) + 2 * 4 * 64
        if with_residual:
            with torch.no_grad():
                total = step(x, residual)[-1]
            assert total.shape == (64, 80)


# --- Autocast ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
def test_under_autocast(device: str, dtype: torch.dtype, rank: int) -> None:
    """fp32 weights, products in bf16: judged in bf16. The norm and the residual stream keep x's dtype."""
    x, residual = (leaf(2, 37, 80, device=device, dtype=dtype) for _ in range(2))
    projections = joined([48, 48], 80, device, torch.float32, rank=rank)
    n = norm(80, device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        *outputs, total = apply(x, n, projections, residual)
        assert {y.dtype for y in outputs} == {torch.bfloat16}
        assert total.dtype == dtype
        check_layer(x, n, projections, residual, arithmetic=torch.bfloat16)


# --- torch ---


@pytest.mark.slow
def test_compiles_in_one_graph(device: str) -> None:
    x, residual = (leaf(4, 128, device=device, dtype=torch.float32) for _ in range(2))
    layer = quantised("nf4 nested", 32, 128, device)
    first = joined([48, 32], 128, device, torch.float32, rank=2)
    n = norm(128, device, torch.float32)

    def function(x: Tensor, residual: Tensor) -> list[Tensor]:
        q, k, total = apply(x.sin(), n, first, residual)
        (v,) = apply(total, n, [Projection(frozen_or_dense(layer), layer.bias)])
        return [q.unflatten(-1, (4, 12)).transpose(0, 1) * 2, k, v, total]

    inputs = leaves(x, residual, n, first)
    runs = []
    for f in (function, compiled(function)):
        outputs = f(x, residual)
        runs.append([*outputs, *gradients(outputs, inputs, [y.detach() for y in outputs])])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want)


# --- Mistakes ---


def test_errors_name_the_argument(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    w = torch.ones(8, device=device)
    p = projection(6, 8, device, torch.float32)
    cases: list[tuple[Any, Any, Any, Any, Any, str]] = [
        (1.0, w, w, [p], None, "x: pass"),
        (x.int(), w, w, [p], None, "x: pass"),
        (x.sum(), w, w, [p], None, r"x: shape \(\)"),
        (x, w[:7], w, [p], None, "norm_weight: "),
        (x, w, w.int(), [p], None, "norm_bias: "),
        (x, w, w, [p], x[:1], "residual: "),
        (x, w.to("meta"), w, [p], None, "norm_weight: .* on meta"),
        (x, w, w, [], None, "projections: pass at least one"),
        (x, w, w, [p, projection(6, 7, device, torch.float32)], None, r"projections\[1\]\.weight: 7 columns"),
        (x.half(), w, w, [p], None, r"projections\[0\]\.weight: torch.float32 does not fit torch.float16"),
    ]
    for bad_x, weight, bias, projections, residual, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            layer_norm_linear(bad_x, weight, bias, projections, residual=residual)
