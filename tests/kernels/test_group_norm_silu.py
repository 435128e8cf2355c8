"""GroupNorm and SiLU against their fp64 definition.

This file runs in every implementation: see conftest.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapo_kernels import _launch as launch
from mapo_kernels._triton import jit, tl
from mapo_kernels.hardware import Card, assume_card
from mapo_kernels.ops import _group_norm_launch as cutting
from mapo_kernels.ops._group_norm_kernels import _tile
from mapo_kernels.ops.group_norm_silu import (
    GroupNormSilu,
    group_norm_silu,
    group_norm_silu_apply,
    group_norm_silu_backward,
    group_norm_silu_forward,
)
from mapo_kernels.reference import group_norm_silu_reference
from tests.tolerances import assert_three_way

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


def channel_innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make(
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    last: bool = False,
    parameters: torch.dtype | None = None,
) -> list[Tensor]:
    """x of mean 1 and deviation 2, weight, bias."""
    x = (2 * torch.randn(shape) + 1).to(device, dtype)
    weight, bias = (torch.randn(shape[1]).to(device, parameters or dtype) for _ in range(2))
    return [t.requires_grad_() for t in (channel_innermost(x) if last else x, weight, bias)]


def eager(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, silu: bool = True) -> Tensor:
    wide = torch.promote_types(x.dtype, x.dtype if weight is None else weight.dtype)
    if weight is None and bias is not None:  # torch wants both or none
        weight = torch.ones_like(bias)
    parameters = (None if p is None else p.to(wide) for p in (weight, bias))
    z = torch.nn.functional.group_norm(x.to(wide), groups, *parameters).to(x.dtype)
    return torch.nn.functional.silu(z) if silu else z


def check(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, silu: bool = True, ulps: float = 2.0
) -> None:
    """y and every gradient by the three-way rule, and where they lie."""
    leaves = [t for t in (x, weight, bias) if t is not None]
    y = group_norm_silu(x, groups, weight, bias, silu=silu)
    truth = group_norm_silu_reference(x, groups, weight, bias, silu=silu)
    plain = eager(x, groups, weight, bias, silu)
    grad = torch.randn(y.shape).to(y)
    results = [
        (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))) for out in (y, truth, plain)
    ]
    for name, got, want, other in zip(("y", "x", "weight", "bias"), *results, strict=False):
        assert_three_way(got, want.double(), other, name=name, ulps=ulps)
    assert y.stride() == torch.empty_like(x).stride()
    assert results[0][1].stride() == torch.empty_like(x).stride()


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(device: str, dtype: torch.dtype, last: bool) -> None:
    x, weight, bias = make((2, 20, 6, 7), device, dtype, last=last)
    check(x, 4, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_silu(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = make((1, 12, 6, 7), device, dtype)
    check(x, 4, weight, bias, silu=False)


@pytest.mark.grid
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 3, 1, 1), 1),
        ((3, 6), 2),  # no positions at all
        ((1, 12, 5), 3),
        ((1, 4, 3, 2, 5), 2),
        ((1, 74, 3, 3), 2),  # groups of a prime number of channels
        ((1, 7, 1, 1023), 7),
        ((1, 300, 3, 1), 1),  # wider than a program
    ],
)
def test_any_shape(device: str, shape: tuple[int, ...], groups: int, last: bool) -> None:
    x, weight, bias = make(shape, device, last=last)
    check(x, groups, weight, bias)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 1)])
def test_groups_of_one_element(device: str, shape: tuple[int, ...]) -> None:
    """Their variance is 0: y is silu(bias), and x gets no gradient."""
    x, weight, bias = make(shape, device)
    y = group_norm_silu(x, shape[1], weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.silu(bias).view(1, -1, 1, 1).expand(shape))
    grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert (grad_x == 0).all()
    assert (grad_weight == 0).all()


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    samples=st.integers(1, 2),
    groups=st.integers(1, 5),
    group=st.integers(1, 24),
    space=st.lists(st.integers(1, 9), max_size=3),
    last=st.booleans(),
    silu=st.booleans(),
)
def test_shapes_at_random(
    device: str, samples: int, groups: int, group: int, space: list[int], last: bool, silu: bool
) -> None:
    if group * math.prod(space) < 3:  # the gradient of so few elements is nothing but rounding
        return
    x, weight, bias = make((samples, groups * group, *space), device, torch.float64, last=last)
    y = group_norm_silu(x, groups, weight, bias, silu=silu)
    truth = group_norm_silu_reference(x, groups, weight, bias, silu=silu)
    grad = torch.randn(y.shape).to(y)
    got, want = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (y, truth))
    for a, b in zip((y, *got), (truth, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def small_blocks(monkeypatch: pytest.MonkeyPatch, tile: int, lanes: int = 256) -> None:
    """Cut small tensors as production cuts large ones."""
    monkeypatch.setattr(cutting, "TILE", tile)
    monkeypatch.setattr(cutting, "MOST_LANES", lanes)
    monkeypatch.setattr(cutting, "SPLIT_BLOCK", 4)
    monkeypatch.setattr(cutting, "REGION_SHARE", 4)
    monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", tile)


@pytest.mark.parametrize(
    ("shape", "groups", "last", "lanes", "tile"),
    [
        ((1, 3, 11, 11), 1, False, 256, 32),  # one channel at a time
        ((1, 14, 2, 3), 2, False, 256, 32),  # four channels of a group, then the other three
        ((2, 6, 3, 3), 3, False, 256, 64),  # several whole groups, one group left over
        ((1, 24, 5, 5), 12, True, 16, 64),  # as many groups as fill the lanes, the rest by themselves
        ((1, 12, 8, 5), 1, True, 8, 32),  # a group wider than the lanes
    ],
)
def test_many_regions(
    device: str,
    shape: tuple[int, ...],
    groups: int,
    last: bool,
    lanes: int,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_blocks(monkeypatch, tile, lanes)
    x, weight, bias = make(shape, device, last=last)
    cut = cutting._cut(x, groups, torch.float32)
    if shape[2] > 3:
        assert cut.chunks > 1
        assert cut.steps > 1
    assert cut.blocks > 1
    assert (cut.parts > 1) == (cut.span > cut.used)
    check(x, groups, weight, bias)


@pytest.mark.parametrize(("offset", "last"), [(1e2, False), (1e2, True), (1e4, False)])
def test_a_mean_far_from_zero_costs_no_digits(
    device: str, offset: float, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are as good as a mean in fp32 allows; E[x²] − E[x]² loses its square of that."""
    small_blocks(monkeypatch, 128)
    x, weight, bias = make((1, 8, 8, 7), device, last=last)
    x = x.detach() + offset
    _, mean, rstd = group_norm_silu_forward(x, 2, weight, bias, 1e-5, True)
    groups = torch.unflatten(x, 1, (2, 4)).flatten(2)
    variance, average = torch.var_mean(groups.double(), 2, correction=0)
    truth = (variance + 1e-5).rsqrt()
    tolerance = torch.finfo(torch.float32).eps * offset / 2
    assert (mean - average).abs().max() <= 4 * tolerance
    assert (rstd / truth - 1).abs().max() <= tolerance
    naive = (groups**2).mean(2) - groups.mean(2) ** 2
    assert ((naive / variance).sqrt() - 1).nan_to_num(1.0).abs().max() > 4 * tolerance


@pytest.mark.parametrize(("groups", "group", "used"), [(32, 10, 120), (8, 20, 120), (4, 80, 240)])
def test_groups_of_sdxl(device: str, groups: int, group: int, used: int) -> None:
    """Groups of 10, 20 and 80 channels, channels_last: 12, 6 and 3 at a time, and what is left over."""
    x, weight, bias = make((1, groups * group, 1, 3), device, torch.bfloat16, last=True)
    cut = cutting._cut(x, groups, torch.float32)
    assert cut.used == used
    assert cut.blocks > 1
    check(x, groups, weight, bias)


@pytest.mark.parametrize(("weighted", "biased"), [(False, False), (True, False), (False, True)])
def test_without_parameters(device: str, weighted: bool, biased: bool) -> None:
    x, weight, bias = make((2, 12, 5, 5), device)
    check(x, 3, weight if weighted else None, bias if biased else None)


def test_parameters_of_another_dtype(device: str) -> None:
    x, weight, bias = make((2, 12, 5, 5), device, torch.bfloat16, parameters=torch.float32)
    check(x, 3, weight, bias)
    x, weight, bias = make((2, 12, 5, 5), device, torch.float32, parameters=torch.float64)
    check(x, 3, weight, bias)
    assert group_norm_silu_forward(x, 3, weight, bias, 1e-5, True)[1].dtype == torch.float64


@pytest.mark.parametrize(("value", "last"), [(math.nan, False), (math.inf, True)])
def test_nan_and_inf_stay_in_their_group(device: str, value: float, last: bool) -> None:
    x, weight, bias = make((2, 12, 5, 5), device, last=last)
    grad = torch.randn(x.shape, device=device)
    clean = group_norm_silu(x, 3, weight, bias)
    (clean_grad,) = torch.autograd.grad(clean, x, grad)
    bad = x.detach().clone()
    bad[1, 5, 2, 3] = value
    bad.requires_grad_()
    y = group_norm_silu(bad, 3, weight, bias)
    (got,) = torch.autograd.grad(y, bad, grad)
    assert y[1, 4:8].isnan().all()
    assert got[1, 4:8].isnan().all()
    for a, b in ((y, clean), (got, clean_grad)):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1, :4], b[1, :4])
        assert torch.equal(a[1, 8:], b[1, 8:])


def test_large_inputs_of_silu(device: str) -> None:
    """σ(z) underflows or is 1 far out; neither may make a NaN of an output or a gradient."""
    x, _, _ = make((1, 4, 8, 8), device)
    weight = torch.full((4,), 300.0, device=device, requires_grad=True)
    bias = torch.zeros(4, device=device, requires_grad=True)
    check(x, 2, weight, bias)


# --- Reproducibility, launches, addresses ---


@pytest.mark.usefixtures("_launches")
@pytest.mark.parametrize("last", [False, True])
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(device: str, last: bool) -> None:
    x, weight, bias = make((2, 8, 9, 11), device, last=last)
    y = group_norm_silu(x, 2, weight, bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    for i in range(2):
        one = x.detach()[i : i + 1].requires_grad_()
        alone = group_norm_silu(one, 2, weight, bias)
        assert torch.equal(alone[0], y[i])
        assert torch.equal(torch.autograd.grad(alone.square().sum(), one)[0][0], grad[i])


class Counting:
    """Counts the launches of a kernel."""

    def __init__(self, kernel: Any, counts: list[str], name: str) -> None:
        self.kernel, self.counts, self.name = kernel, counts, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.counts.append(self.name)
        return self.kernel[grid]


@pytest.mark.usefixtures("_launches")
def test_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[str] = []
    for name in ("statistics", "apply", "gradient_sums", "parameter_gradients", "input_gradient"):
        kernel = f"{name}_kernel"
        monkeypatch.setattr(cutting, kernel, Counting(getattr(cutting, kernel), counts, name))
    x, weight, bias = make((2, 8, 4, 4), device)
    y = group_norm_silu(x, 2, weight, bias)
    assert counts == ["statistics", "apply"]
    counts.clear()
    y.sum().backward()
    assert counts == ["gradient_sums", "parameter_gradients", "input_gradient"]
    counts.clear()
    y = group_norm_silu(x, 2, weight.detach(), bias.detach())
    y.sum().backward()
    assert counts == ["statistics", "apply", "gradient_sums", "input_gradient"]
    counts.clear()
    group_norm_silu(x.detach(), 2, weight, bias.detach()).sum().backward()
    assert counts == ["statistics", "apply", "gradient_sums", "parameter_gradients"]


@jit
def _corner_kernel(out, channels, positions, LAST: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the last channel and the last position lie."""
    channel = tl.zeros([1], dtype=tl.int32) + channels - 1
    offset, _ = _tile(positions - 1, channel, channel >= 0, channels, positions, 1, LAST, WIDE)
    tl.store(out + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], offset)


@pytest.mark.grid
@pytest.mark.usefixtures("_launches")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "height"), [(320, 128), (2**15, 2**8), (2**15 + 32, 2**8)])
def test_offsets_past_32_bits(device: str, channels: int, height: int, last: bool) -> None:
    x = torch.empty(1, channels, height, height, device="meta", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if last else x
    elements = channels * height**2
    wide = cutting._plan(x, 32, torch.float32).constants["WIDE"]
    assert wide == (elements >= 2**31)
    out = torch.zeros(1, dtype=torch.int64, device=device)
    _corner_kernel[(1,)](out, channels, height**2, LAST=last, WIDE=wide)
    assert out.item() == elements - 1


SDXL = [
    (320, 128, 128), (640, 128, 128), (960, 128, 128), (320, 64, 64), (640, 64, 64), (960, 64, 64),
    (1280, 64, 64), (1920, 64, 64), (640, 32, 32), (1280, 32, 32), (1920, 32, 32), (2560, 32, 32),
    (320, 104, 152), (640, 52, 76), (1280, 26, 38),
]  # fmt: skip


@pytest.mark.skipif(tl is None, reason="Triton is not installed: there are no launches to plan")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SDXL)
def test_the_regions_statistics_are_cheap_to_read(shape: tuple[int, ...], last: bool) -> None:
    """Forward moves at most 1.6 × its floor, merging the regions in every program included."""
    x = torch.empty(2, *shape, device="meta", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if last else x
    with assume_card(Card(89, 128)):
        (programs,), (*_, splits), constants = cutting._plan(x, 32, torch.float32)
    groups = constants["span_size"] // constants["group_size"]
    merged = programs * groups * splits * 2 * 4
    parameters = programs * constants["used"] * 2 * 2
    written = 2 * 32 * splits * 2 * 4
    tensor = x.numel() * 2
    assert 3 * tensor + merged + parameters + written <= 1.6 * 2 * tensor


# --- For other operators ---


@pytest.mark.parametrize(("out_dtype", "last"), [(torch.bfloat16, False), (torch.float32, True)])
def test_the_output_again(device: str, out_dtype: torch.dtype, last: bool) -> None:
    """y from the statistics, and from backward's first pass, has the forward's bits."""
    x, weight, bias = (t.detach() for t in make((2, 20, 6, 7), device, torch.bfloat16, last=last))
    y, mean, rstd = group_norm_silu_forward(x, 4, weight, bias, 1e-5, True, out_dtype)
    assert y.dtype == out_dtype
    assert y.stride() == x.stride()
    assert mean.shape == rstd.shape == (2, 4)
    assert torch.equal(group_norm_silu_apply(x, weight, bias, mean, rstd, True, out_dtype), y)
    again = group_norm_silu_backward(
        torch.randn_like(y), x, weight, bias, mean, rstd, True,
        with_input=False, with_weight=False, with_bias=False, with_output=True,
    )  # fmt: skip
    assert again[:3] == (None, None, None)
    assert torch.equal(again.y, y)


def test_nothing_of_an_empty_tensor(device: str) -> None:
    x = torch.empty(0, 8, 4, 4, device=device)
    y, mean, rstd = group_norm_silu_forward(x, 2, None, None, 1e-5, True, torch.bfloat16)
    assert (y.dtype, y.shape, mean.shape) == (torch.bfloat16, x.shape, (0, 2))
    assert group_norm_silu_apply(x, None, None, mean, rstd, True).shape == x.shape


def test_frozen_parameters(device: str) -> None:
    """Each gradient is the same whichever of the others is wanted."""
    leaves = make((1, 8, 6, 7), device)
    grad = torch.randn(1, 8, 6, 7, device=device)
    want = torch.autograd.grad(group_norm_silu(leaves[0], 2, *leaves[1:]), leaves, grad)
    for wanted in ((0,), (1,), (0, 2)):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        y = group_norm_silu(some[0], 2, *some[1:])
        got = torch.autograd.grad(y, [some[i] for i in wanted], grad)
        assert all(torch.equal(g, want[i]) for g, i in zip(got, wanted, strict=True))


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
@pytest.mark.parametrize("compiler", [None, "aot_eager_decomp_partition"])
def test_saves_x_and_two_numbers_per_group(device: str, compiler: str | None) -> None:
    torch.use_deterministic_algorithms(False)
    leaves = make((2, 8, 16, 16), device, torch.bfloat16)
    step = group_norm_silu if compiler is None else torch.compile(group_norm_silu, backend=compiler)
    saved = Saved(*leaves[1:])
    with saved.hooks:
        y = step(leaves[0], 2, *leaves[1:])
    assert saved.bytes == 2 * leaves[0].numel() + 2 * (2 * 2) * 4
    assert all(g is not None for g in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck(device: str, silu: bool) -> None:
    leaves = make((1, 4, 1, 3), device, torch.float64)

    def run(function: Any) -> Any:
        return lambda x, weight, bias: function(x, 2, weight, bias, silu=silu)

    assert torch.autograd.gradcheck(run(group_norm_silu_reference), leaves)
    # In the interpreter each launch takes long.
    assert torch.autograd.gradcheck(run(group_norm_silu), leaves, fast_mode=True)


@pytest.mark.slow
def test_one_dynamic_graph_serves_every_shape(device: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(group_norm_silu, fullgraph=True, dynamic=True, backend=count)
    _, weight, bias = make((2, 8, 4, 4), device)
    for shape in ((2, 8, 4, 5), (3, 8, 6, 7)):
        x = torch.randn(shape, device=device)
        assert torch.equal(compiled(x, 2, weight, bias), group_norm_silu(x, 2, weight, bias))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_leaves_the_dtype(device: str, dtype: torch.dtype) -> None:
    leaves = make((1, 8, 4, 4), device, dtype, parameters=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = group_norm_silu(leaves[0], 2, *leaves[1:])
    assert y.dtype == dtype
    assert torch.equal(y, group_norm_silu(leaves[0], 2, *leaves[1:]))


def test_module(device: str) -> None:
    plain, fused = torch.nn.GroupNorm(2, 8, eps=1e-3), GroupNormSilu(2, 8, eps=1e-3)
    torch.nn.init.normal_(plain.weight)
    fused.load_state_dict(plain.state_dict())
    plain, fused = plain.to(device), fused.to(device)
    x = make((2, 8, 4, 4), device)[0]
    torch.testing.assert_close(fused(x), torch.nn.functional.silu(plain(x)))


X, P = torch.zeros(2, 6, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("x", "groups", "weight", "bias", "error", "message"),
    [
        ([1.0], 2, P, P, TypeError, "x: pass a floating-point tensor"),
        (X.long(), 2, P, P, TypeError, "x: pass a floating-point tensor"),
        (P, 2, P, P, ValueError, r"x: shape \(6,\) has no channels"),
        (X, 4, P, P, ValueError, "num_groups: 4 groups do not divide the 6 channels"),
        (X, 0, P, P, ValueError, "num_groups: 0 groups"),
        (X[:, :0], 1, P[:0], P[:0], ValueError, "num_groups: 1 groups do not divide the 0 channels"),
        (
            X,
            2,
            P[:5],
            P,
            ValueError,
            r"weight: \(5,\) of torch.float32 does not fit x of shape \(2, 6, 3, 3\)",
        ),
        (X, 2, P, P[None], ValueError, r"bias: \(1, 6\) .* pass 6 floating-point numbers"),
        (X, 2, P.long(), P, ValueError, r"weight: \(6,\) of torch.int64"),
        (X, 2, P, P.to("meta"), ValueError, "bias: is on meta but x is on cpu"),
    ],
)
def test_bad_input(x: Any, groups: int, weight: Any, bias: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        group_norm_silu(x, groups, weight, bias)
    assert "\n" not in str(caught.value)
