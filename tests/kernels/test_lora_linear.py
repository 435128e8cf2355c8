"""`lora_linear` against its fp64 definition, plain PyTorch and peft.

This file runs in every implementation: see conftest.py.
"""

import itertools
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mapo_kernels.ops import _linear, _projections
from mapo_kernels.ops._projections import Lora, Projection, pack, unpack
from mapo_kernels.ops.lora_linear import lora_linear
from mapo_kernels.reference import lora_linear_reference
from mapo_kernels.weights import dense_weight, frozen_or_dense, join_weights, views_of_one
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
    quantised,
    same_bits,
)
from tests.saved import compiled, saved_bytes

pytestmark = [pytest.mark.usefixtures("_nan_in_fresh_memory"), *COMPILER_WARNS]


def apply(x: Tensor, p: Projection) -> Tensor:
    assert p.lora is not None
    return lora_linear(x, p.weight, p.bias, *p.lora)


def reference(x: Tensor, p: Projection) -> Tensor:
    assert p.lora is not None
    return lora_linear_reference(x, p.weight, p.bias, *p.lora)


def check_layer(x: Tensor, p: Projection, **options: Any) -> None:
    check(lambda: [apply(x, p)], lambda: [reference(x, p)], lambda: [plain(x, p)], leaves(x, p), **options)


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(device: str, dtype: torch.dtype, bias: bool, trainable: bool) -> None:
    p = projection(48, 80, device, dtype, bias=bias, rank=8, trainable=trainable)
    check_layer(leaf(2, 37, 80, device=device, dtype=dtype), p)


@pytest.mark.parametrize("dtype", HALF)
def test_fp32_factors_beside_half_precision(device: str, dtype: torch.dtype) -> None:
    """Judged in half precision, which the products are computed in; gradients are fp32 like their factors."""
    p = projection(48, 80, device, dtype, rank=8, factors=torch.float32, trainable=False)
    x = leaf(2, 37, 80, device=device, dtype=dtype)
    check_layer(x, p, arithmetic=dtype)
    y = apply(x, p)
    assert [g.dtype for g in gradients([y], leaves(x, p), [y])] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (2, 0, 3, 7), (13, 7), (2, 3, 5, 7)])
def test_any_shape(device: str, shape: tuple[int, ...]) -> None:
    x = leaf(*shape, device=device, dtype=torch.float32)
    p = projection(11, 7, device, torch.float32, rank=3)
    assert apply(x, p).shape == (*shape[:-1], 11)
    check_layer(x, p)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(rows=st.integers(0, 70), features=st.integers(1, 40), out=st.integers(1, 40), rank=st.integers(1, 9))
def test_hypothesis_shapes(rows: int, features: int, out: int, rank: int) -> None:
    x = leaf(rows, features, device="cpu", dtype=torch.float32)
    check_layer(x, projection(out, features, "cpu", torch.float32, rank=rank))


def test_gradcheck(device: str) -> None:
    x = leaf(2, 3, 5, device=device, dtype=torch.float64)
    p = projection(4, 5, device, torch.float64, rank=2)
    assert p.lora is not None
    inputs = (x, p.weight, p.bias, p.lora.a, p.lora.b)
    for function in (lora_linear, lora_linear_reference):
        assert torch.autograd.gradcheck(lambda *t, f=function: f(*t, 0.7), inputs)


# --- Only what is needed ---


WANTED = [w for w in itertools.product([False, True], repeat=5) if sum(w) in (0, 1, 2, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", WANTED)
def test_only_needed_gradients(device: str, wanted: tuple[bool, ...]) -> None:
    """Each is the same whatever else is frozen, and each matrix product is done once, if at all."""
    rows, features, out, rank = 12, 8, 6, 2
    x = leaf(rows, features, device=device, dtype=torch.float64)
    p = projection(out, features, device, torch.float64, rank=rank)
    inputs = leaves(x, p)
    y = apply(x, p)
    every = dict(zip(map(id, inputs), gradients([y], inputs, [y.detach()]), strict=True))
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    if any(wanted):
        y = apply(x, p)
        some = leaves(x, p)
        for tensor, got in zip(some, gradients([y], some, [y.detach()]), strict=True):
            torch.testing.assert_close(got, every[id(tensor)], rtol=1e-12, atol=1e-12)

    of_x, of_weight, _, of_a, of_b = wanted
    products = of_x * (out * features + rank * features) + of_weight * out * features
    products += True * out * rank + of_a * rank * features + of_b * out * rank
    t = x @ p.lora.a.t()  # type: ignore[union-attr]
    tensors, formats, scales = pack([p])
    flops = matrix_flops(_linear.linear_backward_op, y, x, t, tensors, formats, scales, list(wanted))
    unneeded = 0 if of_x or of_a else out * rank
    assert flops == 2 * rows * (products - unneeded)
    forward = matrix_flops(_linear.linear_op, x, tensors, formats, scales)
    assert forward == 2 * rows * (out * features + rank * (out + features))


class Largest(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_fp32_copy_of_the_activations(device: str) -> None:
    x = leaf(64, 80, device=device, dtype=torch.bfloat16)
    p = projection(48, 80, device, torch.bfloat16, rank=4, factors=torch.float32, trainable=False)
    tensors, formats, scales = pack([p])
    with torch.no_grad(), Largest() as largest:
        y, t = _linear.linear_op._init_fn(x, tensors, formats, scales)
        needed = [True, False, False, True, True]
        _linear.linear_backward_op._init_fn(y, x, t, tensors, formats, scales, needed)
    assert largest.elements <= 4 * 80  # the factors
    with Largest() as largest:
        plain(x, p)
    assert largest.elements >= 64 * 80


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_saves_the_input_and_the_rank_r_product(device: str, compile: bool) -> None:
    x = leaf(64, 80, device=device, dtype=torch.bfloat16)
    p = projection(48, 80, device, torch.bfloat16, rank=4, factors=torch.float32, trainable=False)
    doubled = (compiled if compile else lambda f: f)(lambda x: apply(x * 2, p))
    assert saved_bytes(lambda: doubled(x), besides=[x, *pack([p])[0]]) == 2 * 64 * (80 + 4)
    assert saved_bytes(lambda: plain(x * 2, p), besides=[x, *pack([p])[0]]) == 4 * 64 * (80 + 4)


def test_saves_no_input_for_a_frozen_a(device: str) -> None:
    x = leaf(64, 80, device=device, dtype=torch.bfloat16)
    p = projection(48, 80, device, torch.bfloat16, rank=4, trainable=False)
    assert p.lora is not None
    p.lora.a.requires_grad_(False)
    assert saved_bytes(lambda: apply(x * 2, p), besides=pack([p])[0]) == 2 * 64 * 4


# --- Quantised weights ---


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_is_the_dequantised_weight(device: str, kind: str, dtype: torch.dtype) -> None:
    x = leaf(2, 7, 128, device=device, dtype=dtype)
    p = frozen_projection(kind, 64, 128, device, dtype)
    dense = dequantised(p, dtype)
    inputs = leaves(x, p)
    runs = [[y, *gradients([y], inputs, [y.detach()])] for y in (apply(x, p), apply(x, dense))]
    same_bits(*runs)
    check_layer(x, p)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4"])
def test_four_bits_are_dequantised_as_by_bitsandbytes(device: str, kind: str, stored: torch.dtype) -> None:
    layer = quantised(kind, 64, 128, device, stored)
    want = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert want.dtype == stored
    frozen = frozen_or_dense(layer)
    assert frozen.shape == (64, 128)
    for dtype in (torch.float64, *DTYPES):
        assert torch.equal(dense_weight(frozen, dtype), want.to(dtype))


def test_int8_is_dequantised_as_by_bitsandbytes(device: str) -> None:
    """Codes and scales are found before and after the layer's first forward pass, which moves them."""
    layer = quantised("int8", 64, 128, device)
    before = frozen_or_dense(layer)
    want = torch.ops.bitsandbytes.int8_vectorwise_dequant(*before.tensors)
    torch.testing.assert_close(dense_weight(before, torch.float32), want, rtol=2**-22, atol=0)
    layer(torch.randn(2, 128, device=device))
    assert layer.weight.CB is None
    same_bits(frozen_or_dense(layer).tensors, before.tensors)


def test_quantised_layer_that_is_not_quantised_yet(device: str) -> None:
    for layer in (
        bnb.nn.Linear4bit(64, 32, quant_type="nf4"),
        bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
    ):
        with pytest.raises(ValueError, match="not quantised yet"):
            frozen_or_dense(layer)
    layer = quantised("nf4", 32, 64, device)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        frozen_or_dense(layer)


def test_weight_of_an_ordinary_layer(device: str) -> None:
    layer = nn.Linear(4, 3, device=device)
    assert frozen_or_dense(layer) is layer.weight


# --- peft ---


def peft_layer(base: nn.Module, dtype: torch.dtype) -> Any:
    """peft's own layer over `base`, with a B that is not zero."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0)
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    for factor in (layer.lora_A, layer.lora_B):
        factor.to(dtype)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    return layer


def like_peft(x: Tensor, layer: Any) -> Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lora_linear(
        x, frozen_or_dense(layer.base_layer), layer.base_layer.bias, a, b, layer.scaling["default"]
    )


def reference_of(x: Tensor, layer: Any) -> Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer
    return lora_linear_reference(x, frozen_or_dense(base), base.bias, a, b, layer.scaling["default"])


def check_peft(x: Tensor, layer: Any, **options: Any) -> None:
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    check(
        lambda: [like_peft(x, layer)],
        lambda: [reference_of(x, layer)],
        lambda: [layer(x)],
        inputs,
        **options,
    )


def test_equals_peft_in_fp64(device: str) -> None:
    layer = peft_layer(nn.Linear(128, 64, device=device, dtype=torch.float64), torch.float64)
    x = leaf(2, 9, 128, device=device, dtype=torch.float64)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    runs = []
    for y in (like_peft(x, layer), layer(x)):
        runs.append([y, *gradients([y], inputs, [torch.ones_like(y)])])
    for got, want in zip(*runs, strict=True):
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4"])
def test_no_worse_than_peft_on_four_bits(device: str, kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes' own layers compute in fp32 and below. Its int8 layer quantises activations: no peer."""
    layer = peft_layer(quantised(kind, 64, 128, device), torch.float32)
    x = leaf(2, 9, 128, device=device, dtype=dtype)
    check_peft(x, layer, arithmetic=dtype)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_no_worse_than_peft_in_bf16(device: str, factors: torch.dtype) -> None:
    """Factors in bf16 with bf16, or in fp32: judged in bf16, the arithmetic of the products."""
    layer = peft_layer(nn.Linear(128, 64, device=device, dtype=torch.bfloat16), factors)
    x = leaf(2, 33, 128, device=device, dtype=torch.bfloat16)
    check_peft(x, layer, arithmetic=torch.bfloat16)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_no_worse_than_peft_under_autocast(device: str, base: torch.dtype) -> None:
    layer = peft_layer(nn.Linear(128, 64, device=device, dtype=base), torch.float32)
    x = leaf(2, 33, 128, device=device, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert like_peft(x, layer).dtype == torch.bfloat16
        check_peft(x, layer, arithmetic=torch.bfloat16)


# --- torch ---


# --- Packing and joining ---


def test_pack_and_unpack(device: str) -> None:
    projections = [
        projection(6, 64, device, torch.float32, rank=2),
        projection(5, 64, device, torch.float32, bias=False),
        frozen_projection("nf4 nested", 8, 64, device, torch.float32),
        frozen_projection("fp4", 8, 64, device, torch.float32)._replace(bias=None),
        frozen_projection("int8", 8, 64, device, torch.float32)._replace(lora=None),
    ]
    tensors, formats, scales = pack(projections)
    assert all(a is b for a, b in zip(pack(unpack(tensors, formats, scales))[0], tensors, strict=True))
    again = unpack(tensors, formats, scales)
    assert [p.weight.shape for p in again] == [p.weight.shape for p in projections]
    assert [p.lora and p.lora.scale for p in again] == [0.7, None, 0.7, 0.7, None]
    assert _projections.total_rank(again) == 2 + 3 + 3


def test_join_weights(device: str) -> None:
    weights = [nn.Parameter(torch.randn(n, 5, device=device)) for n in (3, 4, 2)]
    values = [w.detach().clone() for w in weights]
    assert views_of_one(weights) is None
    matrix = join_weights(weights)
    same_bits(weights, values)
    joined = views_of_one(weights)
    assert joined is not None
    assert joined.data_ptr() == matrix.data_ptr()
    assert torch.equal(joined, torch.cat(values))
    assert views_of_one(weights[::-1]) is None  # another order
    assert views_of_one([weights[0], weights[2]]) is None  # a gap
    assert views_of_one([weights[0], weights[1].detach().clone()]) is None
    assert views_of_one([weights[0], weights[1][:, :4]]) is None
    assert torch.equal(views_of_one(weights[1:]), matrix[3:])  # type: ignore[arg-type]


# --- Mistakes ---


def test_errors_name_the_argument(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    good = projection(6, 8, device, torch.float32, rank=2)
    assert good.lora is not None
    assert good.bias is not None
    a, b, scale = good.lora
    four_bit = quantised("nf4", 32, 64, device)
    cases: list[tuple[Any, Projection, str]] = [
        ([1.0], good, "x: pass"),
        (x.long(), good, "x: pass"),
        (x.sum(), good, r"x: shape \(\)"),
        (x[:, :0], good, r"x: shape \(2, 0\)"),
        (x, good._replace(weight=four_bit.weight.data), "frozen_or_dense"),
        (x, good._replace(weight=frozen_or_dense(four_bit)), "64 columns"),
        (x, good._replace(weight=good.bias), r"weight: shape \(6,\)"),
        (x, good._replace(weight=torch.randn(6, 7, device=device)), "7 columns"),
        (x, good._replace(bias=good.bias[:5]), "bias: shape"),
        (x, good._replace(lora=Lora(a[:, :7], b, scale)), r"lora\.a: shape"),
        (x, good._replace(lora=Lora(a, b[:, :1], scale)), r"lora\.b: shape"),
        (x.bfloat16(), good, "weight: torch.float32 does not fit torch.bfloat16"),
        (x.to("meta"), good, "is on"),
    ]
    for bad_x, p, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            apply(bad_x, p)
    with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(ValueError, match="float64"):
        apply(x, projection(6, 8, device, torch.float64, rank=2))


@pytest.mark.parametrize("scale", [0.25, 0.125])
def test_a_gradient_of_b_overflows_only_where_it_is_too_large(device: str, scale: float) -> None:
    """In fp16 the unscaled product would: 64 rows of 64 · 24 are 98,304."""
    x = torch.full((64, 16), 1.0, dtype=torch.float16, device=device)
    weight = torch.zeros(8, 16, dtype=torch.float16, device=device)
    a = torch.full((4, 16), 1.5, dtype=torch.float16, device=device, requires_grad=True)
    b = torch.zeros(8, 4, dtype=torch.float16, device=device, requires_grad=True)
    y = lora_linear(x, weight, None, a, b, scale)
    (found,) = torch.autograd.grad(y, b, torch.full_like(y, 64.0))
    assert found.isfinite().all()
    assert torch.equal(found, torch.full_like(found, 64 * 64 * 24 * scale))
