"""Noise from keys, noisy latents, and the loss's target made again from the keys.

This file runs in every implementation: see conftest.py.
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from mapo_kernels import _launch as launch
from mapo_kernels import backend, paired_loss
from mapo_kernels._triton import jit, tl
from mapo_kernels.ops import _noise, _pair_kernels
from mapo_kernels.ops._noise import normals
from mapo_kernels.ops._pair_layout import Halves, merge_layout
from mapo_kernels.ops.paired_noise import NoiseTarget, noise_key, paired_noise, paired_noise_epsilon
from mapo_kernels.reference import paired_noise_reference
from tests.kernels.pairs import Counting, gradient, needs, tensors
from tests.saved import compiled, saved_bytes
from tests.tolerances import assert_three_way

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


def batch(
    sample: tuple[int, ...], pairs: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected latents, keys, alphas, sigmas."""
    chosen, rejected = torch.randn(2, pairs, *sample).to(device, dtype)
    keys = torch.tensor([noise_key(0, 3, f"pair {i}") for i in range(pairs)], device=device)
    alphas = torch.rand(pairs, device=device)
    return chosen, rejected, keys, alphas, (1 - alphas**2).sqrt()


def noise_of(keys: Tensor, sample: tuple[int, ...]) -> Tensor:
    """(B, *sample) fp32: ε as the operator makes it."""
    zeros = torch.zeros(len(keys), *sample, device=keys.device)
    ones = torch.ones(len(keys), device=keys.device)
    noisy = paired_noise(zeros, zeros, keys, ones, ones)
    assert torch.equal(*noisy.chunk(2))
    return noisy.chunk(2)[0]


def check_noise(chosen: Tensor, rejected: Tensor, *rest: Tensor, **settings: Any) -> Tensor:
    got = paired_noise(chosen, rejected, *rest, **settings)
    truth = paired_noise_reference(chosen, rejected, *rest)
    keys, alphas, sigmas = rest
    dtype = settings.get("out_dtype", chosen.dtype)
    noise = paired_noise_epsilon(keys, tuple(chosen.shape[1:])).to(dtype)
    a, s = (x.to(dtype).view(-1, *[1] * (chosen.ndim - 1)) for x in (alphas, sigmas))
    eager = torch.cat([a * x.to(dtype) + s * noise for x in (chosen, rejected)])
    # ε itself may be a few ulps of fp32 off: a square root, a logarithm and two polynomials.
    fp32 = 4 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    assert_three_way(got, truth, eager, ulps=2 + fp32)
    return got


# --- The distribution ---


def kolmogorov_smirnov(x: Tensor) -> float:
    """√n · sup |F_n − Φ|: 1.95 is passed by one normal sample in a thousand."""
    x = x.double().flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    n = len(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(math.sqrt(n) * torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max())


def test_standard_normal(device: str) -> None:
    keys = torch.tensor([noise_key(0, 0, "a"), noise_key(0, 0, "b"), -1], device=device)
    x = noise_of(keys, (2**17,)).double().cpu()
    n = x.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15)):
        spread = math.sqrt(float((x**power).var()) / n)
        assert abs(float((x**power).mean()) - moment) <= 4 * spread, power
    assert kolmogorov_smirnov(x) <= 1.95
    for word in range(4):  # every word of a counter by itself
        assert kolmogorov_smirnov(x[:, word::4]) <= 1.95, word
    assert 4 < x.abs().max() < 6.8
    bound = 4 / math.sqrt(x.shape[1])
    assert (torch.corrcoef(x) - torch.eye(3)).abs().max() <= bound  # keys
    for lag in range(1, 9):  # neighbours, in a counter and across counters
        assert abs(float((x[0, lag:] * x[0, :-lag]).mean())) <= bound, lag
        assert abs(float((x[0, lag:] ** 2 * x[0, :-lag] ** 2).mean()) - 1) <= 8 * bound, lag


def test_the_tails_are_finite() -> None:
    """The four corner words: u = 2⁻³³ is the farthest a number can lie, u = 1 gives 0."""
    words = torch.tensor([0, 2**32 - 1, 2**31, 2**30, 2**31 - 1])
    radius = _noise._radius_torch(words)
    assert radius.isfinite().all()
    assert float(radius.max()) == pytest.approx(math.sqrt(66 * math.log(2)))
    cosine, sine = (x.double() for x in _noise._circle_torch(words))
    angle = ((words & 0x3FFFFFFF) - 2**29).double() * (2 * math.pi / 2**32) + (words >> 30) * (math.pi / 2)
    assert (cosine - angle.cos()).abs().max() <= 2e-7
    assert (sine - angle.sin()).abs().max() <= 2e-7


def test_the_circle_is_a_circle() -> None:
    words = torch.randint(2**32, (100_000,))
    cosine, sine = (x.double() for x in _noise._circle_torch(words))
    angle = ((words & 0x3FFFFFFF) - 2**29).double() * (2 * math.pi / 2**32) + (words >> 30) * (math.pi / 2)
    assert (cosine - angle.cos()).abs().max() <= 2e-7
    assert (sine - angle.sin()).abs().max() <= 2e-7


# --- A function of the key and the element ---

KEY = -4324119297054371181
NUMBERS = [1.1426740, -0.5529636, -0.2904905, 0.8798242, 0.7413986, 0.2109878]


def test_known_numbers(device: str) -> None:
    """Frozen: a change would silently give every resumed run other noise."""
    assert noise_key(0, 0, "a") == KEY
    assert noise_key(7, "held-out", "x") != noise_key(7, "held-out", "y") != noise_key(8, "held-out", "y")
    got = noise_of(torch.tensor([KEY], device=device), (6,))
    torch.testing.assert_close(got[0].cpu(), torch.tensor(NUMBERS), rtol=2e-6, atol=2e-7)


def test_kernel_and_torch_agree_to_a_few_ulps(device: str) -> None:
    keys = torch.tensor([noise_key(1, 2, str(i)) for i in range(3)], device=device)
    got, want = noise_of(keys, (5, 13, 17)), paired_noise_epsilon(keys, (5, 13, 17))
    assert ((got - want).abs() <= 4 * torch.finfo(torch.float32).eps * want.abs().clamp(min=0.1)).all()


def test_both_halves_see_the_same_noise(device: str) -> None:
    chosen, rejected, keys, alphas, sigmas = batch((3, 5, 7), 4, device)
    noisy = paired_noise(chosen, rejected, keys, torch.zeros_like(alphas), sigmas)
    assert torch.equal(*noisy.chunk(2))


def test_noise_does_not_depend_on_the_batch(device: str) -> None:
    """Splits, order and company of the pairs: a process that has some of them draws the same for those."""
    chosen, rejected, *rest = batch((4, 9, 9), 5, device)
    whole = paired_noise(chosen, rejected, *rest)
    for rows in ([3], [4, 0], [2, 1, 3]):
        part = paired_noise(chosen[rows], rejected[rows], *(x[rows] for x in rest))
        assert torch.equal(part, whole[[*rows, *(r + 5 for r in rows)]])


def test_noise_does_not_depend_on_the_block_size(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[paired_noise.__module__]
    arguments = batch((3, 7, 11), 2, device)
    first = paired_noise(*arguments)
    for block in (16, 128):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", block)
        assert torch.equal(paired_noise(*arguments), first)


def test_a_longer_sample_begins_with_the_shorter_one(device: str) -> None:
    keys = torch.tensor([5], device=device)
    assert torch.equal(noise_of(keys, (1000,))[:, :77], noise_of(keys, (77,)))


PROCESS = """
import sys
sys.path[:0] = {path!r}
import torch
from mapo_kernels.ops.paired_noise import noise_key, paired_noise_epsilon
keys = torch.tensor([noise_key(11, 4, f"pair {{i}}") for i in {rows}])
torch.save(paired_noise_epsilon(keys, (4, 8, 8)), sys.argv[1])
"""


@pytest.mark.slow
def test_another_process_draws_the_same(tmp_path: Path) -> None:
    """It has every second pair, as with data parallelism."""
    keys = torch.tensor([noise_key(11, 4, f"pair {i}") for i in range(6)])
    want = paired_noise_epsilon(keys, (4, 8, 8))
    code = PROCESS.format(path=[str(ROOT), str(ROOT / "kernels")], rows=[1, 3, 5])
    file = tmp_path / "noise.pt"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, timeout=120)
    assert torch.equal(torch.load(file), want[1::2])


@jit
def _far_normals(first, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out + tl.arange(0, BLOCK), normals(7, tl.load(first), BLOCK))


@pytest.mark.usefixtures("_launches")
def test_counters_past_32_bits(device: str) -> None:
    """Element 2³⁴ needs the counter's second word: it may not repeat element 0."""
    out = torch.empty(16, device=device)
    _far_normals[(1,)](torch.tensor([2**34], device=device), out, BLOCK=16)
    words = _noise.philox_torch(7, torch.arange(4), 1, 0, 0)
    radius, (cosine, _) = _noise._radius_torch(words[0]), _noise._circle_torch(words[1])
    torch.testing.assert_close(out.cpu()[::4], radius * cosine, rtol=1e-6, atol=1e-6)


# --- Noisy latents ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(device: str, dtype: torch.dtype) -> None:
    arguments = batch((4, 16, 16), 3, device, dtype)
    check_noise(*arguments)
    for out_dtype in (torch.float32, torch.bfloat16):
        assert check_noise(*arguments, out_dtype=out_dtype).dtype == out_dtype


@hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    sample=st.lists(st.integers(1, 13), min_size=1, max_size=5), pairs=st.integers(1, 3), seed=st.integers()
)
def test_any_shape(device: str, sample: list[int], pairs: int, seed: int) -> None:
    chosen, rejected, keys, *scales = batch(tuple(sample), pairs, device)
    check_noise(chosen, rejected, keys ^ (seed % 2**32), *scales)


@pytest.mark.parametrize("sample", [(1,), (1, 1, 1), (3, 7, 11), (1, 1, 1021), (4, 33, 31)])
def test_ragged_shapes(device: str, sample: tuple[int, ...]) -> None:
    check_noise(*batch(sample, 2, device))


def test_any_strides(device: str) -> None:
    """Noise belongs to the logical element: strides change nothing but the result's memory format."""
    chosen, rejected, *rest = batch((3, 5, 7), 3, device)
    want = paired_noise(chosen, rejected, *rest)
    last = [x.to(memory_format=torch.channels_last) for x in (chosen, rejected)]
    got = paired_noise(*last, *rest)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, want)
    spread = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (chosen, rejected)]
    assert torch.equal(paired_noise(*spread, *rest), want)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (chosen, rejected)]
    assert torch.equal(paired_noise(*turned, *rest), want)
    torch.testing.assert_close(
        paired_noise(chosen, last[1], *rest), want
    )  # eager: halves that lie differently
    strided = [torch.stack([x, x], -1).flatten()[::2] for x in rest]
    assert torch.equal(paired_noise(chosen, rejected, *strided), want)


def test_the_walk_keeps_the_logical_order() -> None:
    x = torch.zeros(2, 3, 5, 7)
    last = x.to(memory_format=torch.channels_last)
    flat, mixed = (merge_layout(Halves(t, t), logical=True) for t in (x, last))
    assert flat is not None
    assert mixed is not None
    assert (flat.dims, flat.strides[0][0]) == (1, 1)
    assert (mixed.dims, mixed.sizes[0], mixed.strides[0][:2]) == (2, 35, (3, 1))


def test_flow_matching_scales(device: str) -> None:
    chosen, rejected, keys, sigmas, _ = batch((4, 8, 8), 2, device)
    check_noise(chosen, rejected, keys, 1 - sigmas, sigmas)


def test_one_launch_and_the_same_bits_every_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[paired_noise.__module__]
    kernel = Counting(module._noise_kernel)
    monkeypatch.setattr(module, "_noise_kernel", kernel)
    arguments = batch((4, 33, 31), 2, device)
    first = paired_noise(*arguments)
    assert kernel.launches == (0 if backend(device).name == "eager" else 1)
    for _ in range(3):
        assert torch.equal(paired_noise(*arguments), first)


# --- The loss's target made again ---


def targets(
    kind: str, sample: tuple[int, ...], pairs: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[NoiseTarget, Tensor]:
    """A target from keys, and the same one stored."""
    chosen, rejected, keys, alphas, sigmas = batch(sample, pairs, device, dtype)
    noise = paired_noise_epsilon(keys, sample).repeat(2, *[1] * len(sample))
    latents = torch.cat([chosen, rejected]).float()
    a, s = (x.repeat(2).view(-1, *[1] * len(sample)) for x in (alphas, sigmas))
    stored = {"epsilon": noise, "v": a * noise - s * latents, "flow": noise - latents}[kind]
    return NoiseTarget(keys, kind, (chosen, rejected), alphas, sigmas), stored


KINDS = ["epsilon", "v", "flow"]


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_target_made_again(device: str, kind: str, dtype: torch.dtype) -> None:
    """Values and gradients against fp64, and against the stored target up to rounding."""
    target, stored = targets(kind, (4, 9, 7), 3, device, dtype)
    prediction = (stored + 0.1 * torch.randn_like(stored)).to(dtype).requires_grad_()
    for extra in ({}, {"mask": torch.rand(3, 1, 9, 7, device=device), "reduction": "none"}):
        got, want = paired_loss(prediction, target, **extra), paired_loss(prediction, stored, **extra)
        rounding = 8 * torch.finfo(torch.float32).eps
        for field in ("chosen_error", "rejected_error"):
            a, b = getattr(got, field), getattr(want, field)
            # Each difference is ≈ 0.1 and is off by ulps of the target, whose size is ≈ 4 at most.
            assert ((a - b).abs() <= 0.1 * 4 * rounding).all()
        ones = torch.ones_like(got.loss)
        (a,), (b,) = gradient(got, prediction, grad=ones), gradient(want, prediction, grad=ones)
        torch.testing.assert_close(
            a, b, rtol=2 * torch.finfo(dtype).eps + 1e-3, atol=40 * rounding * float(b.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_target_made_again_whatever_the_layout(device: str, kind: str) -> None:
    target, stored = targets(kind, (3, 5, 7), 2, device)
    prediction = (stored + 0.1).requires_grad_()
    want = paired_loss(prediction, target)
    (want_grad,) = gradient(want, prediction)
    last = prediction.detach().to(memory_format=torch.channels_last).requires_grad_()
    latents = tuple(x.to(memory_format=torch.channels_last) for x in target.latents)
    for p, t in (
        (last, target),
        (prediction, target._replace(latents=torch.cat(target.latents))),
        (last, target._replace(latents=latents)),
    ):
        got = paired_loss(p, t)
        torch.testing.assert_close(got.chosen_error, want.chosen_error, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.rejected_error, want.rejected_error, rtol=1e-6, atol=0)
        (grad,) = gradient(got, p)
        torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=0)
        assert grad.stride() == p.stride()


def test_halves_that_lie_differently_take_the_plain_path(device: str) -> None:
    target, stored = targets("v", (3, 5, 7), 2, device)
    chosen, rejected = stored.add(0.1).chunk(2)
    halves = (chosen.clone().requires_grad_(),
              rejected.to(memory_format=torch.channels_last).requires_grad_())  # fmt: skip
    out = paired_loss(halves, target)
    want = paired_loss(torch.cat(halves), stored)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-3, atol=1e-5)
    assert all(g.isfinite().all() for g in gradient(out, *halves))


def test_target_made_again_in_many_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a program: each one has to start at its own counter."""
    target, stored = targets("epsilon", (2, 31, 9), 1, device)
    prediction = (stored + 0.1).requires_grad_()
    monkeypatch.setattr(_pair_kernels, "BLOCK", 16)
    monkeypatch.setattr(_pair_kernels, "MOST_CHUNKS", 8)
    monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", 16)
    assert _pair_kernels.chunking(2 * 31 * 9)[1] > 16
    got = paired_loss(prediction, target)
    torch.testing.assert_close(got.chosen_error, torch.full_like(got.chosen_error, 0.01), rtol=1e-4, atol=0)
    (grad,) = gradient(got, prediction)
    (want,) = gradient(paired_loss(prediction, stored), prediction)
    torch.testing.assert_close(grad, want, rtol=1e-3, atol=0)


def test_reference_errors_against_a_target_made_again(device: str) -> None:
    target, stored = targets("v", (4, 6, 5), 3, device)
    prediction = (stored + 0.1 * torch.randn_like(stored)).requires_grad_()
    reference = stored + 0.1 * torch.randn_like(stored)
    extra = needs("kto", 3, device)
    del extra["reference_errors"]
    got = paired_loss(prediction, target, objective="kto", reference_prediction=reference, **extra)
    want = paired_loss(prediction, stored, objective="kto", reference_prediction=reference, **extra)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradcheck(device: str) -> None:
    target, _ = targets("v", (1, 1, 2), 1, device)
    prediction = torch.randn(2, 1, 1, 2, device=device).double().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return paired_loss(x, target, beta=2.0, num_train_timesteps=3).loss

    assert torch.autograd.gradcheck(loss, (prediction,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # inside Inductor
def test_only_keys_are_saved_for_epsilon(device: str) -> None:
    target, stored = targets("epsilon", (4, 16, 16), 2, device)
    prediction = (stored + 0.1).requires_grad_()

    def step(prediction: Tensor, keys: Tensor) -> Tensor:
        return paired_loss(prediction, NoiseTarget(keys)).loss

    torch.use_deterministic_algorithms(False)
    for function in (step, compiled(step)):
        saved = saved_bytes(lambda function=function: function(prediction, target.keys), [prediction])
        assert saved == 2 * 8 + 4 * 4  # keys, coefficients


# --- The operators ---


def test_nothing_but_the_noise_is_cast_by_autocast(device: str) -> None:
    arguments = batch((3, 4, 4), 2, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = paired_noise(*arguments)
    assert torch.equal(got, paired_noise(*arguments))


# --- Bad input ---

X = torch.zeros(2, 3, 2, 2)
K = torch.zeros(2, dtype=torch.int64)
S = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:1], K, S, S), ValueError, "latents: chosen is .* but rejected is"),
        ((X, X.half(), K, S, S), ValueError, "latents: chosen is .* torch.float16"),
        ((X[:0], X[:0], K[:0], S[:0], S[:0]), ValueError, "latents: shape .* is empty"),
        ((X.long(), X.long(), K, S, S), TypeError, "latents: dtype torch.int64"),
        ((X, X.to("meta"), K, S, S), ValueError, "latents: chosen is on cpu, rejected on meta"),
        ((X.clone().requires_grad_(), X, K, S, S), ValueError, "chosen_latents: requires a gradient"),
        ((X, X, K.int(), S, S), TypeError, "keys: pass an int64 tensor"),
        ((X, X, [1, 2], S, S), TypeError, "keys: pass an int64 tensor"),
        ((X, X, K[:1], S, S), ValueError, r"keys: shape \(1,\) does not fit 2 pairs"),
        ((X, X, K, S[:1], S), ValueError, r"alphas: shape \(1,\) does not fit 2 pairs"),
        ((X, X, K, S, K), TypeError, "sigmas: pass a floating-point tensor"),
        ((X, X, K, S, 0.5), TypeError, "sigmas: pass a floating-point tensor"),
    ],
)
def test_bad_input(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paired_noise(*arguments)


def test_bad_out_dtype() -> None:
    with pytest.raises(TypeError, match=r"out_dtype: torch.int32 is not supported"):
        paired_noise(X, X, K, S, S, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"keys: shape \(1, 2\) is not"):
        paired_noise_epsilon(K[None], (3,))


P = torch.zeros(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (NoiseTarget(K, "x0"), ValueError, "target.kind: 'x0' is unknown"),
        (NoiseTarget(K.int()), TypeError, "keys: pass an int64"),
        (NoiseTarget(K[:1]), ValueError, "keys: shape"),
        (NoiseTarget(K, "flow"), ValueError, "target.latents: kind 'flow' needs"),
        (NoiseTarget(K, "flow", X), ValueError, "target.latents: 1 pairs of"),
        (NoiseTarget(K, "v", (X, X)), ValueError, "target.alphas: kind 'v' needs them"),
        (NoiseTarget(K, "v", (X, X), S), ValueError, "target.sigmas: kind 'v' needs them"),
        (NoiseTarget(K, "v", (X, X), S, S[:1]), ValueError, "target.sigmas: shape"),
    ],
)
def test_bad_target(target: NoiseTarget, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paired_loss(P, target)
