"""fp8 products with a frozen weight: the rounding bit for bit, products against fp64, and `scaled_mm`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapo_kernels import (
    FrozenWeight,
    Lora,
    Projection,
    fp8_linear,
    frozen_linear,
    layer_norm_linear,
    lora_linear,
)
from mapo_kernels.fp8 import (
    FP8,
    Rows,
    fp8_input_gradient,
    fp8_product,
    from_fp8,
    in_fp8,
    to_fp8,
    to_fp8_eager,
)
from mapo_kernels.weights import dense_weight, join_weights, views_of_one
from tests.kernels.linear_cases import DTYPES, same_bits
from tests.tolerances import assert_three_way

pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")
GRID = torch.arange(127, dtype=torch.uint8).view(FP8).double()
"""Every magnitude that e4m3 has."""


def matrix(rows: int, columns: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, and elements of a row too."""
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    return (x * torch.rand(columns).pow(8)).to(device, dtype)


def weight(out: int, features: int, device: str) -> FrozenWeight:
    rows = to_fp8((torch.randn(out, features) / features**0.5).to(device))
    return FrozenWeight(tuple(rows), f"fp8 {out} {features}")


def rounded(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """In fp64: what the products make of x, or of x · factors."""
    return from_fp8(*to_fp8(x, factors), torch.float64)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 48), (5, 1100), (2, 20000)])
def test_rounds_to_the_nearest_even(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = matrix(*shape, device, dtype)
    x[0, 0] = 0.0
    rows = to_fp8(x)
    same_bits(rows, to_fp8_eager(x, None))
    scales = rows.scales.double()[:, None]
    assert torch.equal(scales.frexp().mantissa, torch.full_like(scales, 0.5))
    scaled = x.float().double() / scales
    largest = scaled.abs().amax(1)
    assert ((largest <= 448) & ((largest > 224) | (largest == 0))).all()
    distances = (scaled.abs()[..., None].cpu() - GRID).abs() if x.numel() < 10000 else None
    codes = rows.codes.view(FP8).double()
    if distances is not None:
        assert torch.equal((scaled - codes).abs().cpu(), distances.amin(2))
        ties = (distances == distances.amin(2, keepdim=True)).sum(2) == 2
        assert not (rows.codes.cpu()[ties] & 1).any()
    assert ((scaled - codes).abs() <= torch.maximum(scaled.abs() / 16, torch.tensor(2.0**-10))).all()


def test_ties_and_subnormals(device: str) -> None:
    """Halfway between each two neighbours, in one row with the largest."""
    between = (GRID[1:] + GRID[:-1]) / 2
    x = torch.cat([between, -between, torch.tensor([448.0])]).float()[None].to(device)
    rows = to_fp8(x)
    assert rows.scales.tolist() == [1.0]
    assert not (rows.codes & 1).any()
    same_bits(rows, to_fp8_eager(x, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_survive(device: str, dtype: torch.dtype) -> None:
    """Dequantised and rounded again they are the same, and dequantising is exact in bf16 as in fp32."""
    rows = to_fp8(matrix(9, 64, device))
    if dtype != torch.float16:  # whose range is smaller than the test's rows
        same_bits(to_fp8(from_fp8(*rows, dtype)), rows)
        assert torch.equal(from_fp8(*rows, dtype).double(), from_fp8(*rows, torch.float64))


def test_not_finite(device: str) -> None:
    x = torch.ones(4, 32, device=device)
    x[1, 3], x[2, 5], x[3] = float("inf"), float("nan"), 0.0
    got = from_fp8(*to_fp8(x), torch.float32)
    assert [bool(row.isfinite().all()) for row in got] == [True, False, False, True]
    assert not got[1:3].isfinite().any()
    assert not got[3].any()


def test_factors_and_strides(device: str) -> None:
    x = matrix(6, 80, device)
    factors = torch.exp2(torch.randint(-9, 9, (80,)).float()).to(device)
    same_bits(to_fp8(x, factors), to_fp8(x * factors))
    wide = torch.cat([x, x], 1)
    same_bits(to_fp8(wide[:, 80:], factors), to_fp8(x, factors))
    same_bits(to_fp8(x.t().contiguous().t(), factors), to_fp8(x, factors))
    assert to_fp8(x[:0]).codes.shape == (0, 80)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rank", [0, 4])
def test_products(device: str, dtype: torch.dtype, rank: int) -> None:
    """Products of the rounded operands, against fp64; the adapter sees x unrounded."""
    frozen = weight(48, 32, device)
    scales = frozen.tensors[1]
    x = torch.randn(3, 5, 32).to(device, dtype).requires_grad_()
    bias = torch.randn(48).to(device, dtype)
    a, b = (torch.randn(*s).div(6).to(device, dtype).requires_grad_() for s in ((4, 32), (48, 4)))
    grad = torch.randn(3, 5, 48).to(device, dtype)
    inputs = [x, a, b] if rank else [x]
    y = lora_linear(x, frozen, bias, a, b, 0.7) if rank else frozen_linear(x, frozen, bias)
    results = [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    def definition(kind: torch.dtype) -> list[Tensor]:
        n, dy, low, high = (t.detach().to(kind) for t in (x, grad, a, b))
        dense = dense_weight(frozen, kind)
        y = F.linear(rounded(x.detach().flatten(0, 1)).to(kind).view_as(n), dense, bias.to(kind))
        # dy · s is rounded, s taken out again: a power of two
        dx = (rounded(grad.flatten(0, 1), scales) / scales).to(kind).view_as(dy) @ dense
        if not rank:
            return [y, dx]
        t, dt = n @ low.t(), 0.7 * (dy @ high)
        return [
            y + 0.7 * (t @ high.t()),
            dx + dt @ low,
            dt.flatten(0, 1).t() @ n.flatten(0, 1),
            0.7 * (dy.flatten(0, 1).t() @ t.flatten(0, 1)),
        ]

    kinds = torch.float64, dtype
    for got, truth, eager in zip(results, *(definition(kind) for kind in kinds), strict=True):
        if in_fp8(x.device) and dtype in (torch.float32, torch.float16):
            got, eager = got.bfloat16(), eager.bfloat16()  # `scaled_mm` writes no more
        assert_three_way(got, truth, eager, ulps=4.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_weight_that_trains(device: str, dtype: torch.dtype) -> None:
    """Two products of rounded operands; the weight's gradient is of what was not rounded."""
    x, w, bias = (torch.randn(*s).to(device, dtype).requires_grad_() for s in ((3, 5, 32), (48, 32), (48,)))
    grad = torch.randn(3, 5, 48).to(device, dtype)
    y = fp8_linear(x, w, bias)
    results = [y.detach(), *torch.autograd.grad(y, [x, w, bias], grad)]
    scales = to_fp8(w.detach()).scales

    def definition(kind: torch.dtype) -> list[Tensor]:
        n, dy, more = (t.detach().to(kind).reshape(-1, t.shape[-1]) for t in (x, grad, bias))
        dense = rounded(w.detach()).to(kind)
        dx = (rounded(grad.flatten(0, 1), scales) / scales).to(kind) @ dense
        y = F.linear(rounded(x.detach().flatten(0, 1)).to(kind), dense, more[0])
        return [y.view(3, 5, 48), dx.view(3, 5, 32), dy.t() @ n, dy.sum(0)]

    kinds = torch.float64, dtype
    for i, (got, truth, eager) in enumerate(zip(results, *map(definition, kinds), strict=True)):
        if in_fp8(x.device) and i < 2 and dtype in (torch.float32, torch.float16):
            got, eager = got.bfloat16(), eager.bfloat16()
        assert_three_way(got, truth, eager, ulps=4.0)


def test_weights_that_train_as_one_matrix(device: str) -> None:
    """q, k and v of one matrix are rounded as one, and give what they give apart, in every gradient."""
    x, norm = torch.randn(5, 32, dtype=torch.float64, device=device), torch.ones(32, device=device).double()
    found = []
    for joined in (False, True):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(n, 32, device=device).double()) for n in (16, 48, 32)]
        if joined:
            join_weights(weights)
        n = x.clone().requires_grad_()
        y = layer_norm_linear(n, norm, None, [Projection(w, fp8=True) for w in weights])
        found.append([*y, *torch.autograd.grad(y, [n, *weights], [t.sin() for t in y])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_error_of_a_product(device: str) -> None:
    """What rounding both operands may cost, element by element; and it is there."""
    x, w = (torch.randn(n, 64, dtype=torch.float64, device=device) for n in (7, 32))
    rows, frozen = to_fp8(x), to_fp8(w)
    got = fp8_product(rows, frozen, None, torch.float64)

    def bounds(exact: Tensor, scales: Tensor) -> Tensor:
        return torch.maximum(exact.abs() / 16, scales.double()[:, None] * 2**-10) + exact.abs() * 2**-24

    dx, dw = bounds(x, rows.scales), bounds(w, frozen.scales)
    error = (got - x @ w.t()).abs()
    assert (error <= x.abs() @ dw.t() + dx @ w.abs().t() + dx @ dw.t()).all()
    assert float(error.norm() / got.norm()) > 1e-3


def test_samples_do_not_meet(device: str) -> None:
    """A row's output and gradient are the same bits whatever the other rows are."""
    frozen = Rows(*weight(32, 48, device).tensors)
    x, dy = matrix(6, 48, device, torch.float64), matrix(6, 32, device, torch.float64)
    both = fp8_product(to_fp8(x), frozen, None, torch.float64), fp8_input_gradient(dy, frozen)
    for i in range(6):
        one = slice(i, i + 1)
        same_bits(
            [fp8_product(to_fp8(x[one]), frozen, None, torch.float64), fp8_input_gradient(dy[one], frozen)],
            [t[one] for t in both],
        )


def test_several_projections_in_one_matrix(device: str) -> None:
    """q, k and v: joined or apart, with or without a dense one between them, they are the same."""
    parts = [weight(n, 32, device) for n in (16, 48, 32)]
    x, norm = torch.randn(5, 32, dtype=torch.float64, device=device), torch.ones(32, device=device).double()
    bias = torch.randn(48, dtype=torch.float64, device=device)

    def outputs(weights: list[FrozenWeight | Tensor]) -> list[Tensor]:
        given = [Projection(w, bias if i == 1 else None) for i, w in enumerate(weights)]
        n = x.clone().requires_grad_()
        y = layer_norm_linear(n, norm, None, given)
        return [*y, *torch.autograd.grad(y, n, [t.sin() for t in y])]

    apart = outputs([*parts])
    codes = [torch.nn.Parameter(p.tensors[0], requires_grad=False) for p in parts]
    join_weights(codes)
    assert views_of_one(codes) is not None
    joined = [FrozenWeight((c.data, p.tensors[1]), p.format) for c, p in zip(codes, parts, strict=True)]
    for got, want in zip(outputs([*joined]), apart, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    mixed = outputs([joined[0], dense_weight(parts[1], torch.float64), joined[2]])
    for i in (0, 2):
        torch.testing.assert_close(mixed[i], apart[i], rtol=1e-12, atol=1e-12)


def test_behind_a_norm_with_an_adapter(device: str) -> None:
    """The codes and scales pass through the operators' arguments as they are."""
    frozen = weight(32, 48, device)
    x = torch.randn(4, 48, dtype=torch.float64, device=device)
    norm = torch.ones(48, dtype=torch.float64, device=device)
    lora = Lora(*(torch.randn(*s, dtype=torch.float64, device=device) for s in ((2, 48), (32, 2))), 0.5)
    (y,) = layer_norm_linear(x, norm, None, [Projection(frozen, None, lora)])
    n = F.layer_norm(x, (48,), norm)
    want = lora_linear(n, frozen, None, *lora)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)


def test_where_fp8_is_multiplied() -> None:
    assert not in_fp8(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and not in_fp8(torch.device("cuda")),
    reason="needs an NVIDIA GPU of compute capability 8.9 or newer",
)
@pytest.mark.parametrize("rows", [1, 2, 154, 4096])
@pytest.mark.parametrize(("out", "features"), [(640, 640), (10240, 1280), (1280, 5120), (1280, 2048)])
def test_scaled_mm(rows: int, out: int, features: int) -> None:
    """The GPU's product of SDXL's shapes against fp64 of the same codes, forward and backward.

    Fast accumulation on sm_90 keeps at least 13 bits of a sum; bf16 keeps 8 of the result.
    """
    frozen = Rows(*weight(out, features, "cuda").tensors)
    x, dy = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (features, out))
    bias = torch.randn(out, device="cuda", dtype=torch.bfloat16)
    exact = from_fp8(*frozen, torch.float64)
    for got, left, right, more in (
        (fp8_product(to_fp8(x), frozen, bias, torch.bfloat16), rounded(x), exact.t(), bias.double()),
        (fp8_input_gradient(dy, frozen), rounded(dy, frozen.scales) / frozen.scales, exact, 0.0),
    ):
        want = left @ right + more
        allowed = 2**-8 * want.abs() + 2**-13 * (left.abs() @ right.abs())
        assert ((got.double() - want).abs() <= allowed).all()
