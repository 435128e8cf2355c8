"""The fused loss against its fp64 definition.

This file runs in every implementation: see conftest.py.
"""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import mpmath
import pytest
import torch
from torch import Tensor

from mapo_kernels import OBJECTIVES, paired_loss, paired_loss_from_errors
from mapo_kernels import _launch as launch
from mapo_kernels.ops import _pair_kernels as kernels
from mapo_kernels.ops._pair_layout import Halves, mask_halves, merge_layout, split_halves
from mapo_kernels.reference import paired_loss_reference
from tests.kernels.pairs import Counting, check, gradient, make, needs, tensors

MAPO = ["mapo_code", "mapo_paper_power", "mapo_paper_scale", "sft"]
"""The objectives without a reference model's errors; test_objectives.py runs the whole family."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", MAPO)
def test_matches_fp64(device: str, objective: str, dtype: torch.dtype) -> None:
    check(*make((6, 4, 16, 16), device, dtype), objective=objective)


@pytest.mark.parametrize(
    "shape",
    [(2, 1), (2, 1, 1, 1), (4, 3, 7, 11), (10, 127), (6, 3, 1, 1023), (2, 4, 33, 65), (2, 2, 3, 4, 5, 6)],
)
def test_any_shape(device: str, shape: tuple[int, ...]) -> None:
    check(*make(shape, device), objective="mapo_code", reduction="none")


@hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    sample=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    pairs=st.integers(1, 4),
    objective=st.sampled_from([*OBJECTIVES]),
    half=st.booleans(),
)
def test_shapes_that_nobody_thought_of(
    device: str, sample: list[int], pairs: int, objective: str, half: bool
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    check(*make((2 * pairs, *sample), device, dtype), objective=objective, **needs(objective, pairs, device))


@pytest.mark.parametrize("pairs", [1, 3, 11])
def test_any_number_of_pairs(device: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 pairs need several tiles of both of the epilogue's loops, the last ones partly filled."""
    monkeypatch.setattr(kernels, "ROWS_PER_TILE", 4)
    monkeypatch.setattr(kernels, "PAIRS_PER_TILE", 8)
    check(*make((2 * pairs, 1, 2, 3), device), weights=torch.rand(pairs, device=device))


@pytest.mark.parametrize(("block", "pairs"), [(16, 1), (64, 2)])
def test_many_chunks_per_sample(device: str, block: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Production cuts a sample into up to 64 chunks of several blocks; so do small blocks and samples."""
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", block)
    numel = 4 * 31 * 9
    _, chunk, chunks = kernels.chunking(numel)
    assert chunks > 16
    assert (chunk > block) == (block == 16)
    check(*make((2 * pairs, 4, 31, 9), device), mask=torch.rand(pairs, 1, 31, 9, device=device))


def test_sdxl_latents(device: str) -> None:
    check(*make((4, 4, 128, 128), device, torch.bfloat16))


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 0.03, 0.3, 1.0, 4.0, 17.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_range_of_errors(device: str, dtype: torch.dtype, gap: float) -> None:
    """Errors from 0 to 1600: the logit's bound holds end to end from the tensors' own values."""
    check(*make((8, 4, 8, 8), device, dtype, gap), objective="mapo_code")


def test_mixed_dtypes(device: str) -> None:
    prediction, target = make((4, 4, 8, 8), device)
    half = prediction.detach().to(torch.bfloat16).requires_grad_()
    check(half, target)
    assert paired_loss(half, target).loss.dtype == torch.float32
    assert paired_loss(half, target.double()).loss.dtype == torch.float64


def test_fp64_is_fp64(device: str) -> None:
    prediction, target = make((4, 4, 8, 8), device, torch.float64)
    out, truth = paired_loss(prediction, target), paired_loss_reference(prediction, target)
    assert (out.logits - truth.logits).abs().max() <= 1e-10
    for a, b in zip(gradient(out, prediction), gradient(truth, prediction), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def layouts(x: Tensor) -> dict[str, Tensor]:
    spread = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    spread[..., ::2] = x
    return {
        "contiguous": x.clone(),
        "channels_last": x.clone(memory_format=torch.channels_last),
        "every second": spread[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.movedim(0, 3).contiguous().movedim(3, 0),
        "flipped rows, offset": torch.cat([x[:1], x])[1:],
    }


@pytest.mark.parametrize(
    "layout",
    ["contiguous", "channels_last", "every second", "transposed", "batch inside", "flipped rows, offset"],
)
def test_any_strides(device: str, layout: str) -> None:
    p, t = make((6, 3, 5, 7), device)
    prediction = layouts(p.detach())[layout].requires_grad_()
    target = layouts(t)["channels_last"]
    check(prediction, target, mask=torch.rand(3, 1, 5, 7, device=device))
    (grad,) = gradient(paired_loss(prediction, target), prediction)
    assert grad.stride() == torch.empty_like(prediction).stride()


def test_dense_layouts_are_walked_flat() -> None:
    x = torch.zeros(4, 3, 5, 7)
    for name, dims in (("contiguous", 1), ("channels_last", 1), ("transposed", 1), ("every second", 2)):
        half = split_halves(layouts(x)[name], None)
        assert merge_layout(half, half).dims == dims - (name == "every second")
    contiguous, last = split_halves(x, None), split_halves(layouts(x)["channels_last"], None)
    per_pixel = mask_halves(torch.zeros(2, 1, 5, 7), contiguous.chosen)
    assert merge_layout(contiguous, contiguous, per_pixel).dims == 2
    assert merge_layout(last, last, per_pixel).dims == 2
    assert merge_layout(contiguous, last).dims == 2
    assert merge_layout(Halves(contiguous.chosen, last.chosen), contiguous) is None


def test_expanded_target_and_prediction(device: str) -> None:
    p, _ = make((1, 3, 5, 7), device)
    check(
        p.detach().expand(4, 3, 5, 7).requires_grad_(),
        torch.zeros(4, 1, 1, 1, device=device).expand(4, 3, 5, 7),
    )


@pytest.mark.parametrize("same_layout", [True, False])
def test_separate_halves(device: str, same_layout: bool) -> None:
    """Halves that lie apart give what the stacked tensor gives, bit for bit, and a gradient each."""
    p, t = make((6, 4, 8, 8), device)
    chosen, rejected = (h.detach().clone().requires_grad_() for h in p.chunk(2))
    if not same_layout:
        rejected = rejected.detach().to(memory_format=torch.channels_last).requires_grad_()
    stacked, apart = paired_loss(p, t), paired_loss((chosen, rejected), t)
    if same_layout:
        for a, b in zip(tensors(stacked), tensors(apart), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(gradient(stacked, p)[0], torch.cat(gradient(apart, chosen, rejected)))
    check((chosen, rejected), t)
    check((chosen, rejected), tuple(t.chunk(2)))
    check(p, tuple(t.chunk(2)), reduction="none")


MASKS = [
    (6, 4, 8, 8),
    (3, 4, 8, 8),
    (1, 4, 8, 8),
    (6, 1, 8, 8),
    (3, 1, 8, 8),
    (1, 1, 8, 8),
    (3, 1, 8, 1),
    (1, 1, 1, 1),
]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MASKS)
def test_mask(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.rand(shape, device=device)
    mask = mask > 0.3 if dtype == torch.bool else (mask + 0.1).to(dtype)
    mask.view(-1)[0] = 1
    check(*make((6, 4, 8, 8), device), mask=mask)


def test_mask_of_ones_changes_nothing(device: str) -> None:
    p, t = make((4, 4, 8, 8), device)
    plain, masked = (
        paired_loss(p, t),
        paired_loss(p, t, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device)),
    )
    for a, b in zip(
        (*tensors(plain), *gradient(plain, p)), (*tensors(masked), *gradient(masked, p)), strict=True
    ):
        assert torch.equal(a, b)


def test_all_zero_mask_is_nan_in_its_pair_only(device: str) -> None:
    p, t = make((4, 4, 8, 8), device)
    mask = torch.ones(4, 1, 8, 8, device=device)
    mask[1] = 0
    out = paired_loss(p, t, mask=mask, reduction="none")
    assert out.loss.isnan().tolist() == [False, True]
    assert out.chosen_error.isnan().tolist() == [False, True]


@pytest.mark.parametrize("objective", MAPO)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_multiply_the_whole_pair(device: str, objective: str, reduction: str) -> None:
    p, t = make((6, 4, 8, 8), device)
    weights = torch.tensor([0.0, 0.5, 3.0], device=device)
    check(p, t, objective=objective, weights=weights, reduction=reduction)
    each = paired_loss(p, t, objective=objective, reduction="none").loss
    out = paired_loss(p, t, objective=objective, weights=weights, reduction=reduction)
    want = each * weights if reduction == "none" else (each * weights).sum() / 3
    torch.testing.assert_close(out.loss, want)
    assert (gradient(out, p, grad=torch.ones_like(out.loss))[0][::3] == 0).all()


def test_gradient_of_an_expanded_and_strided_loss_gradient(device: str) -> None:
    p, t = make((6, 4, 8, 8), device)
    out = paired_loss(p, t, reduction="none")
    (summed,) = torch.autograd.grad(out.loss.sum(), p, retain_graph=True)
    (ones,) = torch.autograd.grad(out.loss, p, torch.ones(3, device=device), retain_graph=True)
    assert torch.equal(summed, ones)
    strided = torch.arange(6.0, device=device)[::2]
    (got,) = torch.autograd.grad(out.loss, p, strided)
    scaled = ones * strided.repeat(2)[:, None, None, None]
    torch.testing.assert_close(got, scaled, rtol=1e-6, atol=0)


# --- Exactness of the logits ---


def exact_score(z: mpmath.mpf) -> mpmath.mpf:
    return mpmath.mpf(1) if z == 0 else z / mpmath.expm1(z)


def exact_logit(objective: str, e_w: float, e_l: float, beta: float) -> float:
    with mpmath.workdps(50):
        w, r, b = mpmath.mpf(e_w), mpmath.mpf(e_l), mpmath.mpf(beta)
        if objective == "mapo_code":
            return float(1000 * (exact_score(w / 2) - exact_score(r / 2)))
        if objective == "mapo_paper_power":
            return float(exact_score(w) ** b - exact_score(r) ** b)
        return float(b * (exact_score(w) - exact_score(r)))


def tricky_errors() -> tuple[list[float], list[float]]:
    """fp32 pairs over [0, 300], most of them equal to within an ulp."""
    up = torch.tensor(math.inf)
    values = torch.cat(
        [torch.tensor([0.0, 1e-45, 1e-30, 0.5, 1.0, 300.0]), 10 ** torch.linspace(-9, 2.47, 10)]
    )
    near = torch.nextafter(values, up)
    far = (values * 1.01).clamp(max=300)
    chosen = torch.cat([values, near, values, values])
    rejected = torch.cat([near, values, values, far])
    return chosen.tolist(), rejected.tolist()


@pytest.mark.parametrize(
    ("objective", "beta"),
    [("mapo_code", 0.1), ("mapo_paper_power", 8.0), ("mapo_paper_power", 1024.0), ("mapo_paper_power", 0.01),
     ("mapo_paper_scale", 8.0), ("mapo_paper_scale", 1024.0)],
)  # fmt: skip
def test_logits_from_the_same_errors(device: str, objective: str, beta: float) -> None:
    chosen, rejected = tricky_errors()
    e_w, e_l = torch.tensor(chosen, device=device), torch.tensor(rejected, device=device)
    want = torch.tensor([exact_logit(objective, w, r, beta) for w, r in zip(chosen, rejected, strict=True)])
    # Not every error is the square of an fp32 number: through the kernel, judge by the errors it returns.
    out = paired_loss(torch.cat([e_w, e_l]).sqrt()[:, None], torch.zeros(2 * len(e_w), 1, device=device),
                      objective=objective, beta=beta)  # fmt: skip
    exact = torch.tensor(
        [
            exact_logit(objective, w, r, beta)
            for w, r in zip(out.chosen_error.tolist(), out.rejected_error.tolist(), strict=True)
        ]
    )
    assert (out.logits.cpu() - exact).abs().max() <= 1e-4
    again = paired_loss_from_errors(out.chosen_error, out.rejected_error, objective=objective, beta=beta)
    assert (again.logits.cpu() - exact).abs().max() <= 1e-4
    given = paired_loss_from_errors(e_w, e_l, objective=objective, beta=beta)
    assert (given.logits.cpu() - want).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("objective", "beta", "scale"),
    [("mapo_code", 0.1, 1000), ("mapo_paper_power", 8.0, 1), ("mapo_paper_scale", 8.0, 8)],
)
def test_fp64_scores_and_slopes_to_twelve_digits(
    device: str, objective: str, beta: float, scale: float
) -> None:
    """Sharp enough to see one wrong digit in the series, which the bounds in fp32 are not."""
    e_w = torch.cat([torch.zeros(1), torch.logspace(-9, 2, 40)]).double().to(device)
    prediction = torch.cat([e_w, e_w.flip(0)]).sqrt()[:, None].requires_grad_()
    target = torch.zeros_like(prediction)
    settings = {"objective": objective, "beta": beta, "reduction": "none"}
    out, truth = (
        paired_loss(prediction, target, **settings),
        paired_loss_reference(prediction, target, **settings),
    )
    errors = zip(out.chosen_error.tolist(), out.rejected_error.tolist(), strict=True)
    exact = torch.tensor([exact_logit(objective, w, r, beta) for w, r in errors], dtype=torch.float64)
    assert (out.logits.cpu() - exact).abs().max() <= 2e-15 * scale
    grad = torch.ones_like(out.loss)
    got, want = gradient(out, prediction, grad=grad)[0], gradient(truth, prediction, grad=grad)[0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-15)


def test_the_released_formula_breaks_the_bound() -> None:
    """The bound is worth testing: exp(z) − 1 in fp32, as released, misses it by far and is NaN at 0."""
    chosen, rejected = map(torch.tensor, tricky_errors())
    want = torch.tensor(
        [exact_logit("mapo_code", w, r, 0.1) for w, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    )
    z_w, z_l = 0.5 * chosen, 0.5 * rejected
    released = 1000 * (z_w / (torch.exp(z_w) - 1) - z_l / (torch.exp(z_l) - 1))
    assert released.isnan().any()
    assert (released - want)[released.isfinite()].abs().max() > 1


def test_limit_at_zero_error(device: str) -> None:
    target = torch.randn(4, 3, 5, 5, device=device)
    prediction = target.clone()
    prediction[2:] += 0.1
    prediction.requires_grad_()
    out = paired_loss(prediction, target)
    assert torch.equal(out.chosen_error, torch.zeros(2, device=device))
    check(prediction, target)
    equal = paired_loss(target.clone().requires_grad_(), target)
    assert equal.logits.tolist() == [0.0, 0.0]
    assert equal.correct.tolist() == [False, False]
    torch.testing.assert_close(equal.loss.item(), 0.1 * math.log(2))


@pytest.mark.grid
@pytest.mark.parametrize("objective", MAPO)
@pytest.mark.parametrize("error", [2e3, 1e6, 1e30])
def test_huge_finite_errors_are_finite(device: str, objective: str, error: float) -> None:
    for halves in ([error, 0.1], [0.1, error], [error, error]):
        e = torch.tensor(halves, device=device)
        prediction = e.sqrt()[:, None].requires_grad_()
        out = paired_loss(prediction, torch.zeros(2, 1, device=device), objective=objective)
        assert all(torch.isfinite(x).all() for x in tensors(out))
        assert torch.isfinite(gradient(out, prediction)[0]).all()


@pytest.mark.grid
@pytest.mark.parametrize("objective", MAPO)
@pytest.mark.parametrize("sample", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_pair_and_show(
    device: str, objective: str, sample: int, value: float
) -> None:
    p, t = make((6, 4, 8, 8), device)
    clean = paired_loss(p, t, objective=objective, reduction="none")
    (clean_grad,) = gradient(clean, p, grad=torch.ones_like(clean.loss))
    bad = p.detach().clone()
    bad[sample, 1, 2, 3] = value
    bad.requires_grad_()
    out = paired_loss(bad, t, objective=objective, reduction="none")
    (grad,) = gradient(out, bad, grad=torch.ones_like(out.loss))
    pair = sample % 3
    others = [i for i in range(3) if i != pair]
    for a, b in zip(tensors(out), tensors(clean), strict=True):
        assert torch.equal(a[others], b[others])
    rows = [*others, *(i + 3 for i in others)]
    assert torch.equal(grad[rows], clean_grad[rows])
    error = out.chosen_error if sample < 3 else out.rejected_error
    assert not torch.isfinite(error[pair])
    assert not torch.isfinite(out.logits[pair])
    assert not torch.isfinite(grad[sample]).any()
    assert not torch.isfinite(out.loss[pair])
    assert not torch.isfinite(paired_loss(bad, t, objective=objective).loss)


# --- Reproducibility and launches ---


@pytest.mark.usefixtures("_launches")
def test_an_error_does_not_depend_on_the_rest_of_the_batch(device: str) -> None:
    p, t = make((6, 4, 33, 31), device)
    whole = paired_loss(p, t)
    for i in range(3):
        one = paired_loss(p[[i, i + 3]], t[[i, i + 3]])
        assert one.chosen_error == whole.chosen_error[i]
        assert one.rejected_error == whole.rejected_error[i]
        assert one.logits == whole.logits[i]


@pytest.mark.usefixtures("_launches")
@pytest.mark.parametrize("halves", [False, True])
def test_one_launch_each_way(device: str, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = Counting(kernels._forward_kernel), Counting(kernels._backward_kernel)
    monkeypatch.setattr(kernels, "_forward_kernel", forward)
    monkeypatch.setattr(kernels, "_backward_kernel", backward)
    p, t = make((6, 4, 8, 8), device)
    prediction = tuple(h.detach().clone().requires_grad_() for h in p.chunk(2)) if halves else p
    out = paired_loss(prediction, t)
    gradient(out, *(prediction if halves else [p]))
    assert (forward.launches, backward.launches) == (1, 1)


@pytest.mark.usefixtures("_launches")
def test_the_completion_counter_is_zero_again(device: str) -> None:
    launch._counters.clear()
    paired_loss(*make((6, 4, 8, 8), device))
    (counter,) = launch._counters.values()
    assert counter.item() == 0
    paired_loss(*make((2, 4, 8, 8), device))
    assert len(launch._counters) == 1
    assert counter.item() == 0


# --- The operator ---


@pytest.mark.parametrize("objective", MAPO)
def test_gradcheck(device: str, objective: str) -> None:
    def loss(prediction: Tensor) -> Tensor:
        return paired_loss(prediction, target, objective=objective, beta=2.0, snr=0.7, num_train_timesteps=3,
                           weights=weights, mask=mask, reduction="none").loss  # fmt: skip

    prediction, target = make((2, 1, 1, 2), device, torch.float64, gap=1.5)
    weights = torch.rand(1, device=device).double()
    mask = torch.rand(2, 1, 1, 2, device=device).double()
    assert torch.autograd.gradcheck(loss, (prediction,))


@pytest.mark.parametrize("objective", MAPO)
def test_gradcheck_from_errors(device: str, objective: str) -> None:
    def loss(e_w: Tensor, e_l: Tensor) -> Tensor:
        return paired_loss_from_errors(e_w, e_l, objective=objective, beta=2.0, num_train_timesteps=3).loss

    e_w = torch.tensor([0.2, 1.0, 30.0, 0.99], device=device).double().requires_grad_()
    e_l = torch.tensor([0.3, 0.1, 25.0, 1.01], device=device).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (e_w, e_l))


@pytest.mark.slow
def test_one_dynamic_graph_serves_every_batch(device: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(paired_loss, fullgraph=True, dynamic=True, backend=count)
    for pairs, size in ((2, 7), (3, 8), (5, 6)):
        p, t = make((2 * pairs, 3, size, size), device)
        assert torch.equal(compiled(p, t).logits, paired_loss(p, t).logits)
    assert len(graphs) == 1


def test_autocast_leaves_the_loss_in_fp32(device: str) -> None:
    p, t = make((4, 3, 4, 4), device)
    plain = paired_loss(p, t)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = paired_loss(p, t)
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, plain.loss)


def test_only_the_loss_carries_a_gradient(device: str) -> None:
    out = paired_loss(*make((4, 3, 4, 4), device))
    assert out.chosen_reference_error is None
    assert out.rejected_reference_error is None
    out = tensors(out)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    assert [tuple(x.shape) for x in out] == [(), (2,), (2,), (2,), (2,)]
    assert all(x.device.type == device for x in out)


# --- Bad input ---

X = torch.zeros(4, 3, 2, 2)
H = torch.zeros(2, 3, 2, 2)


@pytest.mark.parametrize(
    ("prediction", "target", "settings", "error", "message"),
    [
        (X[:3], X[:3], {}, ValueError, r"prediction: shape \(3, 3, 2, 2\) has an odd batch"),
        (X, X[:3], {}, ValueError, r"target: shape \(3, 3, 2, 2\) has an odd batch"),
        (X, torch.zeros(2, 3, 2, 2), {}, ValueError, r"target: 1 pairs .* prediction's 2 pairs"),
        (X, torch.zeros(4, 3, 2, 1), {}, ValueError, r"target: 2 pairs of \(3, 2, 1\)"),
        (X[:0], X[:0], {}, ValueError, r"prediction: shape \(0, 3, 2, 2\) is empty"),
        (X[:, :0], X[:, :0], {}, ValueError, r"prediction: shape .* is empty"),
        (X[:, 0, 0, 0], X[:, 0, 0, 0], {}, ValueError, "no sample dimensions; .* from_errors"),
        (X.long(), X, {}, TypeError, "prediction: dtype torch.int64 is not supported"),
        (X, X.bool(), {}, TypeError, "target: dtype torch.bool is not supported"),
        (X, X.to(torch.complex64), {}, TypeError, "target: dtype torch.complex64"),
        (X.to(torch.float8_e4m3fn), X, {}, TypeError, "prediction: dtype torch.float8_e4m3fn"),
        ([1, 2], X, {}, TypeError, "prediction: pass a"),
        ((H, H, H), X, {}, TypeError, "prediction: pass a"),
        ((H, H[:1]), X, {}, ValueError, "prediction: chosen is .* but rejected is"),
        ((H, H.half()), X, {}, ValueError, "prediction: chosen is .* torch.float16; both halves"),
        (X, X.to("meta"), {}, ValueError, "target: is on meta but prediction is on cpu"),
        ((H, H.to("meta")), X, {}, ValueError, "prediction: chosen is on cpu, rejected on meta"),
        (X, X.clone().requires_grad_(), {}, ValueError, r"target: requires a gradient.*target\.detach"),
        (X, X, {"weights": torch.ones(4)}, ValueError, r"weights: shape \(4,\) does not fit 2 pairs"),
        (X, X, {"weights": torch.ones(2, 1)}, ValueError, "weights: shape"),
        (X, X, {"wieghts": torch.ones(2)}, TypeError, "wieghts: 'mapo_code' has no such setting"),
        (X, X, {"weights": [1.0, 2.0]}, TypeError, "weights: pass a floating-point tensor"),
        (X, X, {"weights": torch.ones(2, dtype=torch.long)}, TypeError, "weights: pass a floating-point"),
        (X, X, {"weights": torch.ones(2, device="meta")}, ValueError, "weights: is on meta"),
        (X, X, {"mask": torch.ones(3, 1, 2, 2)}, ValueError, "mask: shape .* cannot be broadcast"),
        (X, X, {"mask": torch.ones(4, 2, 2, 2)}, ValueError, "mask: shape"),
        (X, X, {"mask": torch.ones(2, 2)}, ValueError, "mask: shape"),
        (X, X, {"mask": torch.ones(())}, ValueError, "mask: shape"),
        (X, X, {"mask": torch.ones(1, 1, 2, 2, dtype=torch.int32)}, TypeError, "mask: pass a bool"),
        (X, X, {"objective": "ppo"}, ValueError, "objective: 'ppo' is unknown; choose one of mapo_code"),
        (X, X, {"reduction": "sum"}, ValueError, "reduction: 'sum' is unknown"),
        (X, X, {"beta": 0.0}, ValueError, "beta: 0.0 must be positive"),
        (X, X, {"snr": math.nan}, ValueError, "snr: nan must be positive"),
        (X, X, {"num_train_timesteps": math.inf}, ValueError, "num_train_timesteps: inf must be positive"),
    ],
)  # fmt: skip
def test_bad_input(prediction: Any, target: Any, settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        paired_loss(prediction, target, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("e_w", "e_l", "error", "message"),
    [
        (torch.ones(2, 1), torch.ones(2, 1), ValueError, "chosen_error: shape"),
        (torch.ones(0), torch.ones(0), ValueError, "chosen_error: shape"),
        (torch.ones(2), torch.ones(3), ValueError, r"rejected_error: \(3,\)"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "rejected_error: .* on meta"),
        (torch.ones(2).long(), torch.ones(2), TypeError, "chosen_error: pass a floating-point"),
        (torch.ones(2), 3.0, TypeError, "rejected_error: pass a floating-point"),
    ],
)
def test_bad_errors(e_w: Any, e_l: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        paired_loss_from_errors(e_w, e_l)
