"""GroupNorm, SiLU and the convolution as one operator, against the fp64 definition.

This file runs in every implementation: see conftest.py.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_kernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mapo_kernels.reference import group_norm_silu_conv_reference
from tests.tolerances import assert_three_way

op = sys.modules["mapo_kernels.ops.group_norm_silu_conv"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("x", "norm_weight", "norm_bias", "conv_weight", "conv_bias")
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def make(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    shape: tuple[int, ...] = (2, 8, 6, 7),
    out: int = 5,
    kernel: tuple[int, int] = (3, 3),
    x_last: bool = False,
    weight_last: bool = False,
    conv_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """x, norm weight and bias, convolution weight and bias."""
    channels = shape[1]
    x = 2 * torch.randn(shape) + 1
    weight = torch.randn(out, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5
    conv_dtype = conv_dtype or dtype
    return [
        t.requires_grad_()
        for t in (
            (last(x) if x_last else x).to(device, dtype),
            torch.randn(channels).to(device, dtype),
            torch.randn(channels).to(device, dtype),
            (last(weight) if weight_last else weight).to(device, conv_dtype),
            torch.randn(out).to(device, conv_dtype),
        )
    ]


def plain(
    x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, *convolution: Any, **geometry: Any
) -> Tensor:
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups, norm_weight, norm_bias))
    y = torch.empty_like(x, dtype=y.dtype).copy_(y)  # CUDA's group_norm forgets channels_last
    return torch.nn.functional.conv2d(y, *convolution, **({"padding": 1} | geometry))


def check(leaves: list[Tensor], groups: int = 2, *, ulps: float = 2.0, **geometry: Any) -> None:
    """The output and every gradient by the three-way rule, and where they lie."""
    out = group_norm_silu_conv(leaves[0], groups, *leaves[1:], **geometry)
    truth = group_norm_silu_conv_reference(leaves[0], groups, *leaves[1:], **geometry)
    other = plain(leaves[0], groups, *leaves[1:], **geometry)
    grad = torch.randn_like(out)
    assert out.stride() == other.stride()
    results = [(t.detach(), *torch.autograd.grad(t, leaves, grad.to(t.dtype))) for t in (out, truth, other)]
    for name, got, want, eager in zip(("out", *NAMES), *results, strict=True):
        assert_three_way(got, want.double(), eager, name=name, ulps=ulps)
    for leaf, got in zip(leaves, results[0][1:], strict=True):
        assert got.stride() == leaf.stride()


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(device: str, dtype: torch.dtype, x_last: bool) -> None:
    # y is rounded once where plain PyTorch rounds it twice, so the two differ by an ulp of y; the convolution
    # weighs that like any other rounding.
    check(make(device, dtype, x_last=x_last))


@pytest.mark.parametrize("x_last", [False, True])
def test_a_channels_last_weight(device: str, x_last: bool) -> None:
    """The convolution's output is then channels_last, and so is the gradient that reaches a contiguous x."""
    check(make(device, x_last=x_last, weight_last=True))


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ((3, 3), {"stride": 2}),
        ((1, 1), {"padding": 0}),
        ((3, 2), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
        ((2, 2), {"stride": 3, "padding": 0}),  # some of y is never read
    ],
)
def test_geometry(device: str, kernel: tuple[int, int], geometry: dict[str, Any]) -> None:
    check(make(device, shape=(1, 6, 7, 5), kernel=kernel), **geometry)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 14, 3, 1), (3, 4, 1, 11)])
def test_any_shape(device: str, shape: tuple[int, ...]) -> None:
    check(make(device, torch.float64, shape=shape, out=1))


def test_without_biases(device: str) -> None:
    x, norm_weight, norm_bias, weight, _ = make(device)
    got = group_norm_silu_conv(x, 2, None, None, weight)
    want = group_norm_silu_conv_reference(x, 2, None, None, weight)
    torch.testing.assert_close(got, want.float())
    got = group_norm_silu_conv(x, 2, norm_weight, norm_bias, weight)
    want = group_norm_silu_conv_reference(x, 2, norm_weight, norm_bias, weight)
    leaves = (x, norm_weight, norm_bias, weight)
    for a, b in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wanted",
    [(0,), (3,), (4,), (1, 2), (0, 4), (3, 4), (0, 3), (0, 1, 2)],
    ids=lambda w: "".join(map(str, w)),
)
def test_frozen_tensors(device: str, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same whichever of the others is wanted; y is made again only for conv_weight."""
    leaves = make(device, shape=(1, 8, 6, 7))
    want = torch.autograd.grad(group_norm_silu_conv(leaves[0], 2, *leaves[1:]).sum(), leaves)

    outputs = []

    def backward(*args: Any, **flags: Any) -> Any:
        gradients = norm_backward(*args, **flags)
        assert [g is not None for g in gradients[:3]] == [i in wanted for i in range(3)]
        outputs.append(gradients.y)
        return gradients

    def apply(*args: Any) -> Tensor:
        outputs.append(norm_apply(*args))
        return outputs[-1]

    norm_backward, norm_apply = op.group_norm_silu_backward, op.group_norm_silu_apply
    monkeypatch.setattr(op, "group_norm_silu_backward", backward)
    monkeypatch.setattr(op, "group_norm_silu_apply", apply)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    got = torch.autograd.grad(group_norm_silu_conv(some[0], 2, *some[1:]).sum(), [some[i] for i in wanted])
    for i, gradient in zip(wanted, got, strict=True):
        torch.testing.assert_close(gradient, want[i])
    assert sum(y is not None for y in outputs) == (3 in wanted)
    assert len(outputs) == (min(wanted) < 4)


# --- Autocast ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    """The convolution's operands are cast, x is not: as if the caller had cast the weights."""
    leaves = make(device, dtype, shape=(1, 8, 6, 7), conv_dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = group_norm_silu_conv(leaves[0], 2, *leaves[1:])
        grads = torch.autograd.grad(out.float().square().sum(), leaves)  # backward under autocast too
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    cast = [t.detach().requires_grad_() for t in leaves]
    want = group_norm_silu_conv(cast[0], 2, *cast[1:3], *(t.to(torch.bfloat16) for t in cast[3:]))
    assert torch.equal(out, want)
    for a, b in zip(grads, torch.autograd.grad(want.float().square().sum(), cast), strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_fp64_alone(device: str) -> None:
    leaves = make(device, torch.float64, shape=(1, 8, 6, 7))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = group_norm_silu_conv(leaves[0], 2, *leaves[1:])
    assert torch.equal(out, group_norm_silu_conv(leaves[0], 2, *leaves[1:]))


# --- The operator ---


class Saved:
    """Bytes that autograd holds for backward besides the given tensors, each storage counted once."""

    def __init__(self, *without: Tensor) -> None:
        self.without = {t.untyped_storage().data_ptr() for t in without}
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.without:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # inside Inductor
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiler", [None, "aot_eager_decomp_partition"])
def test_saves_the_norms_input_only(device: str, compiler: str | None, autocast: bool) -> None:
    """Under autocast too: the cast weights are made again, what is saved of them is the parameters."""
    torch.use_deterministic_algorithms(False)
    leaves = make(device, torch.bfloat16, conv_dtype=torch.float32 if autocast else None)
    step = group_norm_silu_conv if compiler is None else torch.compile(group_norm_silu_conv, backend=compiler)
    saved = Saved(*leaves[1:])
    with saved.hooks, torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        out = step(leaves[0], 2, *leaves[1:])
    assert out.dtype == torch.bfloat16
    assert saved.bytes == 2 * leaves[0].numel() + 2 * (2 * 2) * 4
    assert all(g is not None for g in torch.autograd.grad(out.sum(), leaves))
    three = Saved(*leaves[1:])  # the test can tell: plain PyTorch saves the norm's output and y as well
    with three.hooks, torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        plain(leaves[0], 2, *leaves[1:])
    assert three.bytes >= 3 * 2 * leaves[0].numel()


def test_gradcheck(device: str) -> None:
    leaves = make(device, torch.float64, shape=(1, 4, 2, 2), out=2)

    def run(function: Any) -> Any:
        return lambda x, *rest: function(x, 2, *rest)

    assert torch.autograd.gradcheck(run(group_norm_silu_conv_reference), leaves)
    assert torch.autograd.gradcheck(run(group_norm_silu_conv), leaves, fast_mode=True)


def test_modules_in_place(device: str) -> None:
    """Trained through the modules' own parameters, which is what a patched UNet does."""
    norm, convolution = torch.nn.GroupNorm(2, 8).to(device), torch.nn.Conv2d(8, 5, 3, padding=1).to(device)
    x = make(device)[0]
    out = group_norm_silu_conv(
        x, 2, norm.weight, norm.bias, convolution.weight, convolution.bias, eps=norm.eps
    )
    torch.testing.assert_close(out, convolution(torch.nn.functional.silu(norm(x))))
    out.sum().backward()
    assert all(p.grad is not None for p in (*norm.parameters(), *convolution.parameters(), x))


X, P, W, B = torch.zeros(2, 6, 3, 3), torch.zeros(6), torch.zeros(4, 6, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (([1.0], 2, P, P, W, B), {}, TypeError, "x: pass a floating-point tensor"),
        ((X[0], 2, P[:3], P[:3], W, B), {}, ValueError, "num_groups: 2 groups do not divide"),
        ((X[..., 0], 2, P, P, W, B), {}, ValueError, r"x: shape \(2, 6, 3\) is not \(N, C, H, W\)"),
        ((X, 2, P[:5], P, W, B), {}, ValueError, r"norm_weight: \(5,\) of torch.float32 does not fit"),
        (
            (X, 2, P, P, W[:, :5], B),
            {},
            ValueError,
            r"conv_weight: \(4, 5, 3, 3\) .* \(O, 6, kh, kw\)",
        ),
        ((X, 2, P, P, W[0], B), {}, ValueError, r"conv_weight: \(6, 3, 3\)"),
        ((X, 2, P, P, W.long(), B), {}, ValueError, "conv_weight: .* of torch.int64 does not fit"),
        ((X, 2, P, P, W, B[:3]), {}, ValueError, r"conv_bias: \(3,\) .* pass \(4,\) of torch.float32"),
        ((X, 2, P, P, W, B.half()), {}, ValueError, "conv_bias: .* of torch.float16 does not fit"),
        ((X, 2, P, P, W.to("meta"), None), {}, ValueError, "conv_weight: is on meta but x is on cpu"),
        ((X, 2, P, P, W, B), {"stride": 0}, ValueError, "stride: 0 is not a whole number >= 1"),
        ((X, 2, P, P, W, B), {"padding": (1, 1, 1)}, ValueError, r"padding: \(1, 1, 1\) is not"),
        ((X, 2, P, P, W, B), {"dilation": (1, 0)}, ValueError, r"dilation: \(1, 0\) is not"),
    ],
)
def test_bad_input(
    arguments: tuple[Any, ...], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        group_norm_silu_conv(*arguments, **settings)
    assert "\n" not in str(caught.value)
