"""Layer normalisation against its fp64 definition; in every implementation: see conftest.py."""

import copy
import math
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.autograd import grad as gradient

from mapo_kernels import _launch as launch
from mapo_kernels import backend
from mapo_kernels.hardware import Card, assume_card
from mapo_kernels.ops import _layer_norm_kernels as kernels
from mapo_kernels.ops.layer_norm import (
    LayerNorm,
    layer_norm,
    layer_norm_apply,
    layer_norm_backward,
    layer_norm_forward,
)
from mapo_kernels.reference import layer_norm_reference
from tests.saved import compiled, saved_bytes
from tests.tolerances import assert_three_way

op = sys.modules["mapo_kernels.ops.layer_norm"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


def make(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, param: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a residual, all of which want gradients."""
    channels = shape[-1:]
    x, residual = torch.randn(shape), torch.randn(shape)
    weight, bias = 1 + 0.3 * torch.randn(channels), 0.3 * torch.randn(channels)
    dtypes = (dtype, param or dtype, param or dtype, dtype)
    return tuple(
        t.to(device, d).requires_grad_() for t, d in zip((x, weight, bias, residual), dtypes, strict=True)
    )


def plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What one would write with torch; its layer_norm wants the parameters in the dtype of x."""
    s = x if residual is None else x + residual.to(x.dtype)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, s)


def assert_same(got: Tensor | None, want: Tensor) -> None:
    """To a few roundings: the compiler chooses anew in each kernel which product and sum become one FMA."""
    ulps = 4 * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=ulps, atol=ulps * float(want.abs().max()))


def check(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> None:
    """Outputs and every gradient, by the three-way rule; what is recomputed is the same to roundings."""
    runs: list[tuple[Tensor, ...]] = []
    for function in (layer_norm, layer_norm_reference, plain):
        out = function(x, weight, bias, eps, residual=residual)
        runs.append(out if isinstance(out, tuple) else (out,))
    grads = [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in runs[0]]
    names = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    leaves = {name: leaf for name, leaf in names.items() if leaf is not None and leaf.requires_grad}
    for outputs in zip(*runs, strict=True):
        assert outputs[0].is_contiguous()
        assert_three_way(*(o.detach() for o in outputs), name="output")
    got, want, eager = ([] for _ in runs)
    for results, run in zip((got, want, eager), runs, strict=True):
        reached = [(o, g.to(o.dtype)) for o, g in zip(run, grads, strict=True) if o.requires_grad]
        results += gradient([o for o, _ in reached], leaves.values(), [g for _, g in reached])
    for name, a, b, c in zip(leaves, got, want, eager, strict=True):
        assert_three_way(a, b.double(), c, name=f"gradient of {name}")

    with torch.no_grad():
        y, mean, rstd, summed = layer_norm_forward(x, weight, bias, eps, residual)
        assert torch.equal(y, runs[0][0])
        s = x if summed is None else summed
        assert_same(layer_norm_apply(s, weight, bias, mean, rstd), y)
        grad_sum = grads[1] if residual is not None else None
        again = layer_norm_backward(
            grads[0], s, weight, bias, mean, rstd, grad_sum=grad_sum, with_output=True, with_params=False
        )
        assert_same(again[3], y)
        assert again[1:3] == (None, None)
        if x.requires_grad:
            assert_same(again[0], got[0])


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 9, 640), (3, 1280), (5, 320), (1, 1), (7, 1), (17,), (2, 3, 4, 127), (3, 1031), (4, 64)]
)
def test_matches_fp64(device: str, shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    x, weight, bias, other = make(shape, device, dtype)
    check(x, weight, bias, residual=other if residual else None)


@hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    rows=st.lists(st.integers(1, 6), max_size=3), channels=st.integers(2, 300), half=st.booleans()
)
def test_any_shape(device: str, rows: list[int], channels: int, half: bool) -> None:
    x, weight, bias, residual = make((*rows, channels), device, torch.bfloat16 if half else torch.float32)
    check(x, weight, bias, residual=residual)


@pytest.mark.parametrize(("rows", "channels"), [(37, 20), (131, 5), (9, 200)])
def test_many_tiles_and_programs(
    device: str, rows: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes as in production: several programs with several tiles of several rows, the last ones ragged."""
    monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", 128)
    monkeypatch.setattr(kernels, "SUM_ROWS", 2)
    if backend(device).name == "interpreter":
        tiling = kernels._tiling(rows, channels, torch.device(device), kernels.FORWARD_TILE)
        assert tiling.programs == 4
        assert rows > 2 * tiling.programs * tiling.height
    x, weight, bias, residual = make((rows, channels), device)
    check(x, weight, bias, residual=residual)


def test_longest_rows(device: str) -> None:
    """The longest row of the kernels, and one that is longer: there plain torch runs."""
    for channels in (kernels.MOST_CHANNELS, kernels.MOST_CHANNELS + 1):
        x, weight, bias, _ = make((2, channels), device)
        assert op._is_eager(x) == (channels > kernels.MOST_CHANNELS or backend(device).name == "eager")
        check(x, weight, bias)


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_without_parameters(device: str, with_weight: bool, with_bias: bool) -> None:
    x, weight, bias, residual = make((5, 48), device)
    params = (weight if with_weight else None, bias if with_bias else None)
    check(x, *params)
    check(x, *params, residual=residual)


@pytest.mark.parametrize("trained", ["weight", "bias", "residual", "x"])
def test_frozen(device: str, trained: str) -> None:
    """One input wants a gradient, the others are frozen."""
    x, weight, bias, residual = make((5, 48), device)
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    check(**{n: t.detach().requires_grad_(n == trained) for n, t in tensors.items()})
    if trained != "residual":
        del tensors["residual"]
        check(**{n: t.detach().requires_grad_(n == trained) for n, t in tensors.items()})


def test_frozen_parameters_cost_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    backward = op.layer_norm_backward

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["with_params"])
        return backward(*args, **kwargs)

    monkeypatch.setattr(op, "layer_norm_backward", spy)
    x, weight, bias, residual = make((5, 48), device)
    for w, b in ((weight.detach(), bias.detach()), (weight, bias.detach()), (weight.detach(), bias)):
        gradient(layer_norm(x, w, b).sum(), x)
        gradient(sum(layer_norm(x, w, b, residual=residual)).sum(), x)
    assert calls == [False, False, True, True, True, True]


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.3])
def test_eps(device: str, eps: float) -> None:
    x, weight, bias, _ = make((5, 48), device)
    check(x, weight, bias, eps)


@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(device: str, dtype: torch.dtype, param: torch.dtype) -> None:
    x, weight, bias, residual = make((6, 40), device, dtype, param)
    check(x, weight, bias, residual=residual.detach().float().requires_grad_())


def test_output_of_another_dtype(device: str) -> None:
    """For operators that go on with a matrix product in another type than the norm's input."""
    x, weight, bias, _ = (t.detach() for t in make((6, 40), device))
    exact, mean, rstd, _ = layer_norm_forward(x, weight, bias, 1e-5, None)
    half, *_ = layer_norm_forward(x, weight, bias, 1e-5, None, torch.bfloat16)
    assert torch.equal(half, exact.bfloat16())
    assert_same(layer_norm_apply(x, weight, bias, mean, rstd, torch.bfloat16), half)
    grad = torch.randn(6, 40, device=device).bfloat16()
    wide, narrow = (
        layer_norm_backward(g, x, weight, bias, mean, rstd, with_output=True, with_params=True)
        for g in (grad.float(), grad)
    )
    assert_same(narrow[3], half)
    for a, b in zip(wide[:3], narrow[:3], strict=True):
        assert_same(a, b)
    assert narrow[0].dtype == narrow[1].dtype == torch.float32


def test_fp64_is_fp64(device: str) -> None:
    tensors = make((7, 83), device, torch.float64)
    x, weight, bias, residual = tensors
    constant = torch.full_like(x, 3.0).requires_grad_()
    runs = [
        (*function(x, weight, bias, 1e-5, residual=residual), function(constant, weight, bias))
        for function in (layer_norm, layer_norm_reference)
    ]
    for got, want in zip(*runs, strict=True):
        assert (got - want).norm() <= 1e-13 * want.norm()
    grads = [torch.randn_like(x) for _ in runs[0]]
    for got, want in zip(*(gradient(run, (*tensors, constant), grads) for run in runs), strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm()
    for dtype in DTYPES:  # one fp64 input is enough to compute in fp64
        mixed = layer_norm_forward(x.to(dtype), weight, bias, 1e-5, None, torch.float64)
        truth = layer_norm_reference(x.to(dtype), weight, bias)
        assert (mixed[0] - truth).norm() <= 1e-13 * truth.norm()
    check(x.detach().float().requires_grad_(), residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1e3, -3e4])
def test_large_mean(device: str, dtype: torch.dtype, offset: float) -> None:
    """Where E[x²] − E[x]² has no digit left. Some of these rows are constant in bf16 and fp16."""
    x, weight, bias, residual = make((40, 640), device)
    x = (x.detach() + offset).to(dtype).requires_grad_()
    check(x, weight, bias)
    check(residual.detach().to(dtype).requires_grad_(), weight, bias, residual=x)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_statistics_are_corrected(device: str, offset: float) -> None:
    """The mean is the nearest fp32 number, or nearly, and how far it is off does not show in rstd."""
    x = (offset + torch.randn(64, 640)).to(device)
    _, mean, rstd, _ = layer_norm_forward(x, None, None, 1e-5, None)
    exact = x.double()
    ulp = 2.0 ** (math.frexp(offset)[1] - 24)
    assert (mean.double() - exact.mean(-1)).abs().max() <= 0.55 * ulp
    truth = torch.rsqrt(exact.var(-1, correction=0) + 1e-5)
    assert (rstd.double() / truth - 1).abs().max() <= 1e-6


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("value", [0.0, 0.1, -777.7, 3e4])
def test_constant_rows(device: str, dtype: torch.dtype, value: float) -> None:
    """n is 0, not a rounding error times 1/√eps: y is the bias."""
    x, weight, bias, _ = make((3, 1031), device, dtype)
    x = torch.full_like(x, value).requires_grad_()
    y = layer_norm(x, weight, bias)
    assert torch.equal(y, bias.expand_as(y))
    assert gradient(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 0), (0,)])
def test_no_channels(device: str, shape: tuple[int, ...]) -> None:
    tensors = make(shape, device)
    x, weight, bias, residual = tensors
    y, summed = layer_norm(x, weight, bias, residual=residual)
    assert y.shape == summed.shape == layer_norm(x, weight, bias).shape == shape
    for grad, tensor in zip(gradient(y.sum() + summed.sum(), tensors), tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("used", ["y", "sum"])
def test_one_output_used(device: str, used: str) -> None:
    """The other has no gradient; parameters that only reach the unused one get none."""
    x, weight, bias, residual = tensors = make((6, 20), device)
    results = []
    for function in (layer_norm, layer_norm_reference):
        y, summed = function(x, weight, bias, residual=residual)
        out = y if used == "y" else summed
        results.append(gradient(out.square().sum(), tensors, allow_unused=True))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        torch.testing.assert_close(got, want)


def test_what_is_returned_is_what_is_normalised(device: str) -> None:
    """In bf16 the exact sum and the rounded one normalise differently; y belongs to the rounded one."""
    x, weight, bias, residual = (t.detach() for t in make((8, 64), device, torch.bfloat16))
    y, _, _, summed = layer_norm_forward(x, weight, bias, 1e-5, 100 * residual, torch.float32)
    assert summed is not None
    assert torch.equal(summed, x + 100 * residual)
    assert_same(y, layer_norm_forward(summed, weight, bias, 1e-5, None, torch.float32)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_row(device: str, value: float) -> None:
    x, weight, bias, _ = make((5, 24), device)
    bad = x.detach().clone()
    bad[2, 3] = value
    grad = torch.randn(5, 24, device=device)
    results = []
    for each in (bad.requires_grad_(), x):
        y = layer_norm(each, weight, bias)
        results.append((y, *gradient(y, each, grad)))
    others = [0, 1, 3, 4]
    for got, clean in zip(*results, strict=True):
        assert not got[2].isfinite().any()
        assert torch.equal(got[others], clean[others])


def test_rows_beyond_32_bits(device: str) -> None:
    """Row offsets are 64 bits wide: 9 rows 2**28 elements apart, backed by few pages of one large mapping."""
    width, rows, channels = 2**28, 9, 6
    storage = torch.UntypedStorage(2 * ((rows - 1) * width + channels), device=device)
    x = torch.tensor([], dtype=torch.bfloat16, device=device).set_(storage, 0, (rows, channels), (width, 1))
    assert (rows - 1) * width >= 2**31
    values = torch.randn(rows, channels, device=device).bfloat16()
    x.copy_(values)
    results = []
    for each in (x, values):
        y, mean, rstd, _ = layer_norm_forward(each, None, None, 1e-5, None)
        _, _, _, summed = layer_norm_forward(values, None, None, 1e-5, each)
        backward = layer_norm_backward(
            each, each, None, None, mean, rstd, grad_sum=each, with_output=False, with_params=False
        )
        results.append((y, mean, rstd, summed, backward[0]))
    for got, want in zip(*results, strict=True):
        assert_same(got, want)


# --- Launches ---


class Counting:
    """Counts the launches of a kernel."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("frozen", [False, True])
def test_launches(device: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_layer_norm_params_kernel")
    counters = [Counting(getattr(kernels, name)) for name in names]
    for name, counter in zip(names, counters, strict=True):
        monkeypatch.setattr(kernels, name, counter)
    x, weight, bias, residual = make((6, 20), device)
    out = layer_norm(x, weight.requires_grad_(not frozen), bias.requires_grad_(not frozen), residual=residual)
    gradient((out[0] * out[1]).sum(), x)
    want = (0, 0, 0) if backend(device).name == "eager" else (1, 1, 0 if frozen else 1)
    assert tuple(counter.launches for counter in counters) == want


@pytest.mark.parametrize(
    ("rows", "channels", "programs"), [(8192, 640, 256), (2048, 1280, 128), (32768, 640, 512), (77, 2048, 39)]
)
def test_programs_on_a_4090(rows: int, channels: int, programs: int) -> None:
    """Weight, bias and partial sums move once per program; that bounds what they add to the least traffic."""
    with assume_card(Card(89, 128)):
        assert kernels._tiling(rows, channels, torch.device("cpu"), kernels.FORWARD_TILE).programs == programs
        tiling = kernels._tiling(rows, channels, torch.device("cpu"), kernels.BACKWARD_TILE)
    floor = 5 * rows * channels * 2  # bytes of bf16, both passes
    parameters = (programs + programs + tiling.programs) * channels * 2
    partial_sums = 2 * 2 * tiling.programs * channels * 4
    if rows >= 2048:
        assert parameters <= 0.05 * floor
        assert parameters + partial_sums <= (0.1 if rows >= 8192 else 0.25) * floor


# --- The operator ---


def test_autocast_keeps_the_dtype(device: str) -> None:
    x, weight, bias, residual = (t.detach() for t in make((3, 8), device, torch.bfloat16))
    with torch.autocast(device, dtype=torch.float16):
        y, summed = layer_norm(x, weight, bias, residual=residual)
    assert y.dtype == summed.dtype == torch.bfloat16
    assert_same(y, layer_norm(summed, weight, bias))


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # inside Inductor
def test_saved_bytes(device: str, add: bool, compile: bool) -> None:
    """What was normalised, and two numbers per row."""
    torch.use_deterministic_algorithms(False)
    x, weight, bias, residual = make((16, 64), device)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        if add:
            y, summed = layer_norm(x * 2, weight, bias, residual=residual)
            return y * 3 + summed
        return layer_norm(x * 2, weight, bias) * 3

    function = compiled(block) if compile else block
    function(x, residual)
    besides = [x, weight, bias, residual]
    assert saved_bytes(lambda: function(x, residual), besides) == x.nbytes + 2 * 16 * 4


def test_gradcheck(device: str) -> None:
    tensors = make((2, 3), device, torch.float64)
    for function in (layer_norm, layer_norm_reference):
        assert torch.autograd.gradcheck(lambda x, w, b, f=function: f(x, w, b), tensors[:3])
        assert torch.autograd.gradcheck(lambda x, w, b, r, f=function: f(x, w, b, residual=r), tensors)


@pytest.mark.parametrize("affine", [False, True])
def test_module(device: str, affine: bool) -> None:
    """A drop-in for torch's: the same parameters under the same names, the same numbers."""
    theirs = torch.nn.LayerNorm(24, eps=1e-3, elementwise_affine=affine, device=device)
    for param in theirs.parameters():
        torch.nn.init.normal_(param)
    ours = LayerNorm(24, eps=1e-3, elementwise_affine=affine, device=device)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    x = make((5, 24), device)[0]
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match=r"input: shape \(5, 12\) does not end .*\(24,\)"):
        ours(x[:, :12])


X = torch.zeros(3, 4)
W = torch.zeros(4)


@pytest.mark.parametrize(
    ("x", "settings", "error", "message"),
    [
        ([1.0], {}, TypeError, "x: pass a fp16"),
        (X.long(), {}, TypeError, "x: pass a fp16"),
        (torch.zeros(()), {}, ValueError, r"x: shape \(\) has no dimension"),
        (X, {"weight": W[:3]}, ValueError, r"weight: shape \(3,\) is not \(4,\), the last dimension of x"),
        (X, {"bias": X}, ValueError, r"bias: shape \(3, 4\) is not \(4,\)"),
        (X, {"weight": W.long()}, TypeError, r"weight: pass a fp16, .* of shape \(4,\)"),
        (X, {"bias": 1.0}, TypeError, "bias: pass a"),
        (X, {"weight": W.to("meta")}, ValueError, "weight: is on meta but x is on cpu"),
        (X, {"residual": W}, ValueError, r"residual: shape \(4,\) is not \(3, 4\), that of x; expand it"),
        (X, {"residual": X.to("meta")}, ValueError, "residual: is on meta"),
        (X, {"residual": X.to(torch.complex64)}, TypeError, "residual: pass a"),
    ],
)
def test_bad_input(x: Any, settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        layer_norm(x, **settings)
    assert "\n" not in str(caught.value)
