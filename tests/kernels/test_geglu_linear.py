"""`geglu_linear` against its fp64 definition and plain PyTorch.

This file runs in every implementation: see conftest.py.
"""

import itertools
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapo_kernels.ops._projections import Projection, pack
from mapo_kernels.ops.geglu_linear import geglu_linear
from mapo_kernels.reference import geglu_linear_reference
from tests.kernels.linear_cases import (
    COMPILER_WARNS,
    DTYPES,
    HALF,
    QUANTISED,
    check,
    dequantised,
    frozen_projection,
    gradients,
    leaf,
    leaves,
    matrix_flops,
    plain,
    projection,
    same_bits,
)
from tests.saved import compiled, saved_bytes

op = sys.modules["mapo_kernels.ops.geglu_linear"]
pytestmark = [pytest.mark.usefixtures("_nan_in_fresh_memory"), *COMPILER_WARNS]


def by_hand(projected: Tensor, p: Projection) -> Tensor:
    """diffusers' GEGLU and linear layer."""
    value, gate = projected.chunk(2, dim=-1)
    return plain(value * F.gelu(gate), p)


def check_layer(projected: Tensor, p: Projection, **options: Any) -> None:
    check(
        lambda: [geglu_linear(projected, p)],
        lambda: [geglu_linear_reference(projected, p)],
        lambda: [by_hand(projected, p)],
        leaves(projected, p),
        **options,
    )


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(device: str, dtype: torch.dtype, trainable: bool, rank: int) -> None:
    p = projection(24, 40, device, dtype, rank=rank, trainable=trainable)
    check_layer(leaf(2, 37, 80, device=device, dtype=dtype), p)


@pytest.mark.parametrize("dtype", HALF)
def test_fp32_factors_beside_half_precision(device: str, dtype: torch.dtype) -> None:
    """Judged in half precision, which the products are computed in; gradients are fp32 like their factors."""
    p = projection(24, 40, device, dtype, rank=4, factors=torch.float32, trainable=False)
    check_layer(leaf(2, 37, 80, device=device, dtype=dtype), p, arithmetic=dtype)


@pytest.mark.parametrize("shape", [(14,), (1, 2), (0, 14), (2, 0, 3, 14), (13, 14), (2, 3, 5, 14)])
def test_any_shape(device: str, shape: tuple[int, ...]) -> None:
    p = projection(11, shape[-1] // 2, device, torch.float32, rank=3)
    projected = leaf(*shape, device=device, dtype=torch.float32)
    assert geglu_linear(projected, p).shape == (*shape[:-1], 11)
    check_layer(projected, p)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(rows=st.integers(0, 70), features=st.integers(1, 40), out=st.integers(1, 40), rank=st.integers(0, 9))
def test_hypothesis_shapes(rows: int, features: int, out: int, rank: int) -> None:
    projected = leaf(rows, 2 * features, device="cpu", dtype=torch.float32)
    check_layer(projected, projection(out, features, "cpu", torch.float32, rank=rank))


def test_gradcheck(device: str) -> None:
    projected = leaf(2, 3, 10, device=device, dtype=torch.float64)
    p = projection(4, 5, device, torch.float64, rank=2)
    assert p.lora is not None

    for function in (geglu_linear, geglu_linear_reference):

        def flat(projected: Tensor, w: Tensor, bias: Tensor, *factors: Tensor, f: Any = function) -> Tensor:
            return f(projected, Projection(w, bias, p.lora._replace(a=factors[0], b=factors[1])))  # type: ignore[union-attr]

        inputs = (projected, p.weight, p.bias, p.lora.a, p.lora.b)
        assert torch.autograd.gradcheck(flat, inputs)


# --- Only what is needed ---


WANTED = [w for w in itertools.product([False, True], repeat=5) if sum(w) in (0, 1, 2, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", WANTED)
def test_only_needed_gradients(
    device: str, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is the same whatever else is frozen; nothing is computed twice, or for nobody."""
    rows, features, out, rank = 12, 8, 6, 2
    projected = leaf(rows, 2 * features, device=device, dtype=torch.float64)
    p = projection(out, features, device, torch.float64, rank=rank)
    inputs = leaves(projected, p)
    y = geglu_linear(projected, p)
    every = dict(zip(map(id, inputs), gradients([y], inputs, [y.detach()]), strict=True))
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    if any(wanted):
        y = geglu_linear(projected, p)
        some = leaves(projected, p)
        for tensor, got in zip(some, gradients([y], some, [y.detach()]), strict=True):
            torch.testing.assert_close(got, every[id(tensor)], rtol=1e-12, atol=1e-12)

    of_projected, of_weight, _, of_a, of_b = wanted
    products = of_projected * (out + rank) * features + of_weight * out * features
    products += (of_projected or of_a) * out * rank + of_a * rank * features + of_b * out * rank
    tensors, formats, scales = pack([p])
    y, t = op._geglu_linear_op(projected.detach(), torch.float64, tensors, formats, scales)
    forward, backward = (mock.Mock(wraps=f) for f in (op.geglu_forward, op.geglu_backward))
    monkeypatch.setattr(op, "geglu_forward", forward)
    monkeypatch.setattr(op, "geglu_backward", backward)
    args = (y.detach(), projected, t, tensors, formats, scales, list(wanted))
    assert matrix_flops(op._geglu_linear_backward_op, *args) == 2 * rows * products
    with_g = of_weight or of_a
    assert [call.kwargs for call in backward.call_args_list] == [{"with_output": with_g}] * of_projected
    assert forward.call_count == (with_g and not of_projected)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_saves_the_projection_only(device: str, compile: bool) -> None:
    x = leaf(64, 80, device=device, dtype=torch.bfloat16)
    for rank in (0, 4):
        p = projection(24, 40, device, torch.bfloat16, rank=rank)

        def layer(x: Tensor, p: Projection = p) -> Tensor:
            return geglu_linear(x * 2, p)

        doubled = compiled(layer) if compile else layer
        besides = [x, *pack([p])[0]]
        assert saved_bytes(lambda f=doubled: f(x), besides=besides) == 2 * 64 * (80 + rank)
    assert saved_bytes(lambda: by_hand(x * 2, p), besides=besides) == 2 * 64 * (80 + 40 + 40 + 4)


# --- Quantised weights, autocast ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_is_the_dequantised_weight(device: str, kind: str, dtype: torch.dtype) -> None:
    x = leaf(2, 7, 128, device=device, dtype=dtype)
    p = frozen_projection(kind, 32, 64, device, dtype)
    dense = dequantised(p, dtype)
    runs = [
        [y, *gradients([y], leaves(x, p), [y.detach()])] for y in (geglu_linear(x, p), geglu_linear(x, dense))
    ]
    same_bits(*runs)
    check_layer(x, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
def test_under_autocast(device: str, dtype: torch.dtype, rank: int) -> None:
    """fp32 weights, products in bf16: judged in bf16. GEGLU itself keeps the projection's dtype."""
    x = leaf(2, 37, 80, device=device, dtype=dtype)
    p = projection(24, 40, device, torch.float32, rank=rank)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert geglu_linear(x, p).dtype == torch.bfloat16
        check_layer(x, p, arithmetic=torch.bfloat16)


# --- torch ---


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager_decomp_partition", "inductor"])
def test_compiles_in_one_graph(device: str, compiler: str) -> None:
    p = projection(24, 40, device, torch.float32, rank=2)
    x = leaf(4, 80, device=device, dtype=torch.float32)

    def function(x: Tensor) -> Tensor:
        return geglu_linear(x, p)

    torch._dynamo.reset()
    runs = []
    for f in (function, torch.compile(function, backend=compiler, fullgraph=True)):
        y = f(x)
        runs.append([y, *gradients([y], leaves(x, p), [y.detach()])])
    same_bits(*runs)


# --- Mistakes ---


def test_errors_name_the_argument(device: str) -> None:
    x = torch.randn(2, 16, device=device)
    p = projection(6, 8, device, torch.float32)
    cases: list[tuple[Any, Projection, str]] = [
        (None, p, "projected: pass"),
        (x.int(), p, "projected: pass"),
        (x.sum(), p, r"projected: shape \(\)"),
        (x[:, :15], p, r"projected: shape \(2, 15\)"),
        (x[:, :14], p, "8 columns do not fit the input's 7"),
        (x.half(), p, r"projection\.weight: torch.float32 does not fit torch.float16"),
    ]
    for projected, bad, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            geglu_linear(projected, bad)
