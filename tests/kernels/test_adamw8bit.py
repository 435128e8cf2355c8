"""The optimizer step against its fp64 definition, its codes and its rounding.

This file runs in every implementation: see conftest.py. Equality with bitsandbytes is in
test_adamw8bit_bitsandbytes.py.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mapo_kernels import _launch as launch
from mapo_kernels import _rounding as rounding
from mapo_kernels._philox import philox_torch
from mapo_kernels._triton import jit, tl
from mapo_kernels.hardware import backend
from mapo_kernels.ops import _adamw8bit_eager as eager
from mapo_kernels.ops import _adamw8bit_kernels as kernels
from mapo_kernels.ops import _dynamic_code as book
from mapo_kernels.ops._adamw8bit_tensors import Settings, Tensors, in_order
from mapo_kernels.ops.adamw8bit import AdamW8bit, adamw8bit_
from mapo_kernels.reference import adamw8bit_reference
from tests.tolerances import assert_three_way

op = sys.modules["mapo_kernels.ops.adamw8bit"]

LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


# --- The code book ---


@jit
def _codes(x, out, SIGNED: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    y = tl.load(x + i) / 0.9
    if SIGNED:
        tl.store(out + i, book.signed_code(y).to(tl.uint8))
    else:
        tl.store(out + i, book.unsigned_code(y).to(tl.uint8))


def codes_of(x: Tensor, signed: bool) -> Tensor:
    """What this implementation makes of values in [−1, 1], a power of two of them."""
    if backend(x.device).name == "eager":
        return book.nearest_code(x, signed)
    out = torch.zeros(len(x), dtype=torch.uint8, device=x.device)
    _codes[(1,)](x, out, signed, len(x))
    return out


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_is_chosen(device: str, signed: bool) -> None:
    """Except for a few in a million, and those are not farther from the value by more than fp32 rounding."""
    values = book.code_book(signed, torch.device("cpu"))
    count = 2**16
    samples = [
        torch.rand(count),
        (torch.randn(count) / 5).abs().clamp(max=1),
        10 ** (-6.2 * torch.rand(count)),
    ]
    for sample in samples:
        x = sample * torch.randn(count).sign() if signed else sample
        got = codes_of(x.to(device), signed).cpu()
        distance = (values[got.long()].double() - x.double()).abs()
        above = torch.bucketize(x, values).clamp(1, 255)
        around = torch.stack([values[above - 1], values[above]]).double()
        best = (around - x.double()).abs().amin(0)
        assert float((distance - best).max()) <= 2.4e-7
        assert int((distance > best).sum()) <= 3e-5 * count


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_its_own_values(device: str, signed: bool) -> None:
    values = book.code_book(signed, torch.device(device))
    assert codes_of(values, signed).tolist() == list(range(256))
    ends = torch.tensor([-1.0, 1.0] if signed else [0.0, 1.0], device=device)
    assert codes_of(ends, signed).tolist() == [0, 255]


# --- Rounding ---


@jit
def _round(x, random, out, DTYPE: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    rounded = rounding.round_stochastically(tl.load(x + i), tl.load(random + i), DTYPE)
    tl.store(out + i, rounded.to(DTYPE))


def rounded(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    if backend(x.device).name == "eager":
        return rounding.round_stochastically_torch(x, random, dtype)  # type: ignore[no-any-return]
    out = torch.empty(len(x), dtype=dtype, device=x.device)
    _round[(1,)](x, random, out, kernels._triton_dtype(dtype), len(x))
    return out


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` on both sides of x, fp64; both are x where `dtype` holds it."""
    near = x.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, math.inf))
    down = torch.nextafter(near, torch.full_like(near, -math.inf))
    other = torch.where(near.double() < x.double(), up, torch.where(near.double() > x.double(), down, near))
    pair = torch.stack([near.double(), other.double()])
    return pair.amin(0), pair.amax(0)


def all_magnitudes(count: int, dtype: torch.dtype) -> Tensor:
    """fp32 numbers from below the smallest number of the type to its largest, of both signs."""
    info = torch.finfo(dtype)
    low, high = math.log2(info.tiny) - 12, math.log2(info.max)
    return 2 ** (low + (high - low) * torch.rand(count)) * torch.randn(count).sign()


@pytest.mark.parametrize("dtype", LOW)
def test_every_result_is_a_neighbour_and_right_on_average(device: str, dtype: torch.dtype) -> None:
    """Over all random words, up is chosen as often as the distance asks for: exactly, or to 2^-13 (fp16)."""
    for x in all_magnitudes(6, dtype).tolist():
        exact = torch.full((65536,), x)
        got = rounded(exact.to(device), torch.arange(65536, dtype=torch.int32, device=device), dtype).cpu()
        low, high = (float(side[0]) for side in neighbours(exact[:1], dtype))
        assert {low, high} >= set(got.double().unique().tolist())
        if low < high:
            share = float((got.double() == high).double().mean())
            wanted = (float(exact[0]) - low) / (high - low)
            assert abs(share - wanted) <= (0 if dtype == torch.bfloat16 else 2**-13)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_unbiased_with_its_own_random_numbers(device: str, dtype: torch.dtype) -> None:
    count = 2**18
    x = all_magnitudes(count, dtype)
    random = rounding.random_bits_torch(7, 3, 11, count)
    got = rounded(x.to(device), random.to(device), dtype).cpu().double()
    low, high = neighbours(x, dtype)
    assert bool(((got == low) | (got == high)).all())
    spacing = (high - low).clamp(min=1e-300)
    error = (got - x.double()) / spacing
    share = (x.double() - low) / spacing
    sigma = float((share * (1 - share)).sum().sqrt())
    assert abs(float(error.sum())) <= 4 * sigma


@pytest.mark.parametrize("dtype", LOW)
def test_numbers_of_the_type_stay_and_nothing_finite_becomes_inf(device: str, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for word in (0, 1, 0x8000, 0xFFFF):
        random = torch.full((65536,), word, dtype=torch.int32, device=device)
        got = rounded(patterns.float().to(device), random, dtype).cpu()
        assert torch.equal(got.isnan(), patterns.isnan())
        same = ~patterns.isnan()
        assert torch.equal(got[same].view(torch.int16), patterns[same].view(torch.int16))
    largest = torch.finfo(dtype).max
    above = [largest * 1.001, largest * (1 + 2.0**-12), torch.finfo(torch.float32).max, -largest * 1.001]
    x = torch.tensor([v for v in above if abs(v) <= torch.finfo(torch.float32).max], dtype=torch.float32)
    x = torch.nn.functional.pad(x, (0, 4 - len(x)), value=torch.finfo(torch.float32).max).to(device)
    for word in (0, 0xFFFF):
        got = rounded(x, torch.full((4,), word, dtype=torch.int32, device=device), dtype).cpu()
        assert torch.equal(got.double().abs(), torch.full((4,), largest).double())
    hidden = torch.tensor([0x7F800001, 0x7F80FFFF, -0x7FFFFF, 0x7FC00000], dtype=torch.int32).view(
        torch.float32
    )
    got = rounded(hidden.to(device), torch.full((4,), 0xFFFF, dtype=torch.int32, device=device), dtype)
    assert bool(got.isnan().all())


@jit
def _bits(seed, step, out, first: tl.int64, number: tl.int64):  # type: ignore[no-untyped-def]
    bits = rounding.random_bits(tl.load(seed), number, tl.load(step), first, 4)
    i = tl.arange(0, 4)[:, None] * 256 + tl.arange(0, 256)[None, :]
    tl.store(out + i, bits)


@pytest.mark.parametrize(
    ("seed", "number", "step", "first"), [(0, 0, 1, 0), (-5, 1679, 2**33 + 7, 8192), (2**62, 3, 9, 2**34)]
)
def test_kernels_draw_the_same_bits_as_torch(
    device: str, seed: int, number: int, step: int, first: int
) -> None:
    got = torch.empty(1024, dtype=torch.int32, device=device)
    if backend(device).name == "eager":
        got = rounding.random_bits_torch(seed, number, step, first + 1024)[first:] if first < 2**20 else None
    else:
        _bits[(1,)](
            torch.tensor([seed], device=device), torch.tensor([step], device=device), got, first, number
        )
    counter = torch.arange(first // 8, first // 8 + 128)
    words = torch.stack(philox_torch(seed, counter, number, step & 0xFFFFFFFF, step >> 32), 1)
    want = torch.stack([words & 0xFFFF, words >> 16], 2).view(-1).to(torch.int32)
    assert got is None or torch.equal(got.cpu(), want)
    assert 0.45 < float(want.float().mean()) / 65535 < 0.55


# --- One step against fp64 ---


class Case:
    """Parameters with states from one step, and gradients for the next."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        device: str,
        dtype: torch.dtype,
        grad: torch.dtype,
        **options: Any,
    ) -> None:
        self.params = [torch.nn.Parameter((0.05 * torch.randn(s)).to(device, dtype)) for s in shapes]
        self.options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6, **options}
        self.grads = [0.1 * torch.randn(s).to(device, grad) for s in shapes]
        self.states = [AdamW8bit([p])._state(p, 0) for p in self.params]
        for p, state in zip(self.params, self.states, strict=True):
            signed = (torch.randn(p.shape).to(device), torch.rand(p.shape).to(device))
            for key, x in zip("12", signed, strict=True):
                moment = state[f"state{key}"]
                if moment.dtype == torch.uint8:
                    moment.copy_(torch.randint(40, 250, p.shape))
                    state[f"absmax{key}"].copy_(torch.rand(state[f"absmax{key}"].shape) + 0.5)
                else:
                    moment.copy_(x)

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        """In the parameter's shape, fp32."""
        result = []
        for key, signed in (("1", True), ("2", False)):
            moment = self.states[i][f"state{key}"]
            if moment.dtype == torch.uint8:
                flat = eager._dequantise(moment, self.states[i][f"absmax{key}"], signed)
                moment = torch.empty_like(moment, dtype=torch.float32)
                eager._flat(moment).copy_(flat)
            result.append(moment.clone())
        return result[0], result[1]

    def step(self, **options: Any) -> None:
        device = self.params[0].device
        nothing = torch.empty(0, device=device)
        options = {**self.options, **options}
        options["lr"] = torch.tensor(options["lr"], dtype=torch.float64, device=device)
        with torch.no_grad():
            adamw8bit_(
                self.params,
                self.grads,
                *([s[key] for s in self.states] for key in ("state1", "state2")),
                *([s.get(key, nothing) for s in self.states] for key in ("absmax1", "absmax2")),
                [s["step"] for s in self.states],
                **options,
            )


def plain_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, options: dict[str, Any]) -> Tensor:
    """What one would write by hand in fp32, rounded to the parameter's dtype."""
    b1, b2 = options["betas"]
    g = g.float()
    m, v = m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)
    update = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + options["eps"])
    if options.get("max_update_rms") is not None:
        update = update * (options["max_update_rms"] / update.square().mean().sqrt()).clamp(max=1)
    new = p.float() * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * update
    return new.to(p.dtype)


def check(case: Case) -> None:
    before = [(p.detach().clone(), *case.moments(i)) for i, p in enumerate(case.params)]
    case.step()
    for i, (p, m, v) in enumerate(before):
        name = f"{tuple(p.shape)} {p.dtype}"
        options = case.options
        truth, m_truth, v_truth = adamw8bit_reference(p, case.grads[i], m, v, step=1, **options)
        plain = plain_adamw(p, case.grads[i], m, v, 1, options)
        # Two more roundings: a kernel takes lr / (1 − β₁ᵗ) and √(1 − β₂ᵗ) as fp32 numbers.
        assert_three_way(case.params[i].detach(), truth, plain, ulps=4.0, name=name)
        assert int(case.states[i]["step"]) == 1
        for key, got, want in zip("12", case.moments(i), (m_truth, v_truth), strict=True):
            state = case.states[i]
            if state[f"state{key}"].dtype == torch.float32:
                assert_three_way(got, want, want.float(), name=f"{name} state{key}")
                continue
            blocks = eager._blocks(eager._flat(want.contiguous() if want.is_contiguous() else want))
            torch.testing.assert_close(
                state[f"absmax{key}"].double(), blocks.abs().amax(1), rtol=1e-6, atol=0
            )
            # The widest interval of the book is 0.014 of the maximum, on the CPU plus the table's spacing.
            off = (eager._blocks(eager._flat(got)).double() - blocks).abs().amax(1) / blocks.abs().amax(1)
            assert float(off.max()) <= 0.0071 + 1e-4


SHAPES = [(80, 64), (5000,), (4096,), (4095,), (7, 11), (1,), (0,), (3, 0, 2), (8209,)]


@pytest.mark.grid
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64(device: str, dtype: torch.dtype, grad: torch.dtype) -> None:
    """Many tensors of any size at once; 8209 elements are a prime, 0 are allowed."""
    shapes = SHAPES if grad == torch.float32 else SHAPES[2:5]
    check(Case(shapes, device, dtype, grad))


def test_fp64_parameters(device: str) -> None:
    case = Case([(5000,), (9,)], device, torch.float64, torch.float64)
    before = [(p.detach().clone(), *case.moments(i)) for i, p in enumerate(case.params)]
    case.step()
    for i, (p, m, v) in enumerate(before):
        want, *_ = adamw8bit_reference(p, case.grads[i], m, v, step=1, **case.options)
        assert float((case.params[i].detach() - want).norm()) <= 1e-14 * float(want.norm())


def test_gradcheck_of_the_definition(device: str) -> None:
    def step(p: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return adamw8bit_reference(p, g, torch.ones(4).double(), torch.ones(4).double(), step=3, lr=0.1)

    p, g = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(step, (p, g))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)
)
def test_any_shapes(shapes: list[tuple[int, ...]]) -> None:
    shapes = [s[:2] if math.prod(s) > 20000 else s for s in shapes]
    check(Case(shapes, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, torch.bfloat16))


def test_mixed_kinds_in_one_call(device: str) -> None:
    case = Case([(5000,), (5000,), (70,), (70,)], device, torch.bfloat16, torch.bfloat16)
    for i in (1, 3):
        case.params[i] = torch.nn.Parameter(case.params[i].detach().float())
        case.grads[i] = case.grads[i].float()
    check(case)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "unaligned"])
def test_memory_order(device: str, layout: str) -> None:
    """Moments and their blocks follow the parameter's memory; a gradient in another order is copied."""
    plain = torch.nn.Parameter(torch.randn(16, 33, 3, 3, device=device) * 0.05)
    grad = torch.randn_like(plain)
    if layout == "channels_last":
        other = plain.detach().to(memory_format=torch.channels_last)
    elif layout == "transposed":
        other = plain.detach().transpose(0, 1).contiguous().transpose(0, 1)
    else:
        other = torch.cat([plain.detach().new_zeros(1), plain.detach().flatten()])[1:].view(plain.shape)
    flat = torch.nn.Parameter(eager._flat(other).clone())  # the same memory without a shape
    flat.grad = eager._flat(in_order(grad, other)).clone()
    other = torch.nn.Parameter(other)
    other.grad = grad
    for p in (other, flat):
        optimizer = AdamW8bit([p], lr=1e-2)
        optimizer.step()
        optimizer.step()
        assert optimizer.state[p]["state1"].stride() == p.stride()
    assert torch.equal(eager._flat(other.detach()), flat.detach())
    assert other.stride() == (plain.stride() if layout == "unaligned" else other.stride())


def test_a_parameter_with_gaps_is_refused(device: str) -> None:
    p = torch.nn.Parameter(torch.zeros(8, 8, device=device)[:, ::2])
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(8, 4\): strides .* gaps"):
        AdamW8bit([p]).step()


def test_a_layout_that_changed_is_put_back(device: str) -> None:
    """The moments' blocks are cut in memory order, so the order is part of the state."""
    p = torch.nn.Parameter(torch.randn(16, 33, 3, 3, device=device).to(memory_format=torch.channels_last))
    q = torch.nn.Parameter(p.detach().clone())
    grads = [torch.randn_like(p) for _ in range(2)]
    a, b = AdamW8bit([p]), AdamW8bit([q])
    for step, grad in enumerate(grads):
        if step:
            q.data = q.data.contiguous()
        p.grad, q.grad = grad, grad.contiguous()
        a.step()
        b.step()
    assert torch.equal(p, q)
    assert q.stride() == p.stride()


@pytest.mark.usefixtures("_launches")
def test_more_than_2_31_elements(device: str) -> None:
    """Address arithmetic: the table says that the tensor begins 2^31 elements before the ones that exist."""
    case = Case([(8192,)], device, torch.float32, torch.bfloat16)
    twin = Case([(8192,)], device, torch.float32, torch.bfloat16)
    for a, b in zip((*case.params, *case.grads), (*twin.params, *twin.grads), strict=True):
        b.data.copy_(a.data)
    for key, value in case.states[0].items():
        if not key.startswith("qmap"):
            twin.states[0][key].copy_(value)
    case.step()

    state = twin.states[0]
    tensors = Tensors(
        twin.params,
        twin.grads,
        *([state[k]] for k in ("state1", "state2", "absmax1", "absmax2", "step")),
        [0],
    )
    plan = kernels.make_plan(tensors)
    sizes = torch.tensor([4, 2, 1, 1, 4, 4], device=device)
    far = torch.tensor([2**31] * 4 + [2**31 // 256] * 2, device=device)
    plan.table[0, :6] -= sizes * far
    plan.table[0, 7] += 2**31
    plan.buckets[0].chunks[:, 1] += 2**31 // plan.buckets[0].chunk
    options = case.options
    kernels.launch(
        plan,
        Settings(
            torch.tensor(options["lr"], dtype=torch.float64, device=device),
            None, None, None, *options["betas"], options["eps"], options["weight_decay"], None,
        ),
    )  # fmt: skip
    assert torch.equal(case.params[0], twin.params[0])
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(case.states[0][key], state[key])


# --- Scalars on the device ---


def snapshot(case: Case) -> list[Tensor]:
    return [t.detach().clone() for t in (*case.params, *(t for s in case.states for t in s.values()))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_found_inf_changes_nothing(device: str, dtype: torch.dtype) -> None:
    case = Case([(4100,), (9,)], device, torch.bfloat16, torch.bfloat16)
    case.grads[0][5] = math.nan
    seed = torch.tensor(1, device=device)
    before = snapshot(case)
    case.step(found_inf=torch.ones((), device=device).to(dtype), seed=seed, max_update_rms=0.1)
    assert equal(before, snapshot(case))
    case.step(found_inf=torch.zeros((), device=device).to(dtype), seed=seed)
    assert int(case.states[0]["step"]) == 1
    assert bool(case.params[0][5].isnan())
    assert not bool(case.params[1].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_found_inf_of_each_tensor(device: str, dtype: torch.dtype) -> None:
    """Tensors of several kinds, some skipped: the others take the step they take alone."""
    shapes: list[tuple[int, ...]] = [(4100,), (9,), (4112,), (5000,), (7,)]
    flags = torch.tensor([1, 0, 0, 1, 1], device=device).to(dtype)
    seed = torch.tensor(1, device=device)
    torch.manual_seed(4)
    case = Case(shapes, device, torch.bfloat16, torch.bfloat16)
    torch.manual_seed(4)
    whole = Case(shapes, device, torch.bfloat16, torch.bfloat16)
    case.grads[0][5] = case.grads[4][2] = math.nan
    before = snapshot(case)
    case.step(found_inf=flags, seed=seed, max_update_rms=0.1)
    whole.step(seed=seed, max_update_rms=0.1)
    count = len(shapes)
    after, stepped = snapshot(case), snapshot(whole)
    for i, flag in enumerate(flags.tolist()):
        assert torch.equal(after[i], before[i] if flag else stepped[i])
        assert not torch.equal(after[i], before[i]) or flag
        for key, value in case.states[i].items():
            if not flag:
                assert torch.equal(value, whole.states[i][key])
        assert int(case.states[i]["step"]) == 1 - flag
    names = [f"{i}.{key}" for i in range(count) for key in case.states[i]]
    for name, old, new in zip(names, before[count:], after[count:], strict=True):
        if flags[int(name[0])]:
            assert torch.equal(old, new), name


def test_grad_scale_divides(device: str) -> None:
    torch.manual_seed(3)
    plain = Case([(4100,), (9,)], device, torch.float32, torch.float32)
    torch.manual_seed(3)
    scaled = Case([(4100,), (9,)], device, torch.float32, torch.float32)
    for g in scaled.grads:
        g *= 1024
    plain.step()
    scaled.step(grad_scale=torch.tensor(1024.0, device=device))
    assert equal(snapshot(plain), snapshot(scaled))


def test_the_optimizer_and_the_function_agree(device: str) -> None:
    """Also: a step counts only for parameters with a gradient, and lr may be a tensor or a number."""
    params = [torch.nn.Parameter(torch.randn(n, device=device).bfloat16()) for n in (4100, 9, 30)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    by_number = AdamW8bit(params, lr=0.5, seed=4)
    by_tensor = AdamW8bit(copies, lr=torch.tensor(0.5, device=device), seed=4)
    for step in range(3):
        by_number.param_groups[0]["lr"] = 0.5 / (1 + step)
        by_tensor.param_groups[0]["lr"].fill_(0.5 / (1 + step))
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            p.grad = None if (i, step) == (2, 1) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in (by_number, by_tensor):
            optimizer.step()
    # fp32 cannot hold 0.5 / 3 exactly, so the last step may differ by a rounding.
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)
        assert float((p == q).float().mean()) > 0.99
    assert [int(by_number.state[p]["step"]) for p in params] == [3, 3, 2]


def test_the_optimizer_takes_a_flag_for_each_gradient(device: str) -> None:
    """Over several groups and dtypes, counting only parameters that have a gradient."""
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (4100, 9, 30, 4096, 8)]
    params[1] = torch.nn.Parameter(params[1].detach().double())  # takes the plain path everywhere
    optimizer = AdamW8bit([{"params": params[:3]}, {"params": params[3:]}], lr=0.1)
    for i in (0, 1, 2, 4):
        params[i].grad = torch.ones_like(params[i])
    optimizer.found_inf = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    optimizer.step()
    assert [bool((p == 1).all()) for p in params] == [True, False, True, True, False]
    optimizer.found_inf = torch.zeros(5, device=device)
    with pytest.raises(ValueError, match=r"found_inf: \(5,\) for 4 tensors; pass one value, or \(4,\)"):
        optimizer.step()


# --- Clipping, determinism, launches ---


@pytest.mark.parametrize("limit", [0.3, 100.0])
def test_the_update_is_clipped_to_its_rms(device: str, limit: float) -> None:
    shapes: list[tuple[int, ...]] = [(20000,), (4096,), (77,)]
    case = Case(shapes, device, torch.float32, torch.float32, max_update_rms=limit, lr=1.0, weight_decay=0.0)
    before = [p.detach().clone() for p in case.params]
    check(case)
    for p, old in zip(case.params, before, strict=True):
        rms = float((p.detach() - old).double().square().mean().sqrt())
        assert rms == pytest.approx(limit, rel=1e-5) if limit < 1 else rms < 10


def test_repeats_are_equal_bits_whatever_the_grouping(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or with others, in small blocks or large: the same parameters, codes and maxima."""
    sizes = [4097, 300, 5000]

    def run(split: bool) -> list[Tensor]:
        torch.manual_seed(1)
        case = Case([(n,) for n in sizes], device, torch.bfloat16, torch.bfloat16)
        seed = torch.tensor(9, device=device)
        if not split:
            case.step(seed=seed)
            return snapshot(case)
        for i in (2, 0, 1):
            part = Case([], device, torch.bfloat16, torch.bfloat16)
            part.params, part.grads, part.states = [case.params[i]], [case.grads[i]], [case.states[i]]
            part.step(seed=seed, ids=[i])
        return snapshot(case)

    together = run(split=False)
    assert equal(together, run(split=False))
    assert equal(together, run(split=True))
    monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", 1024)
    monkeypatch.setattr(kernels, "CHUNK", 2048)
    assert equal(together, run(split=False))


@pytest.mark.usefixtures("_launches")
def test_few_launches_and_tables_that_stay(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    for name in ("_advance_kernel", "_update_kernel", "_squares_kernel", "_clip_kernel"):
        kernel = getattr(kernels, name)

        class Counted:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
                launches.append(self.name)
                return self.kernel[grid]  # type: ignore[no-any-return]

        monkeypatch.setattr(kernels, name, Counted(name, kernel))
    uploads = []
    upload = kernels._upload
    monkeypatch.setattr(kernels, "_upload", lambda *args: uploads.append(args) or upload(*args))

    params = [torch.nn.Parameter(torch.randn(n, device=device).bfloat16()) for n in (4096, 9, 4112, 31, 5)]
    optimizer = AdamW8bit(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert launches == ["_advance_kernel", "_update_kernel", "_update_kernel"]
    assert len(uploads) == 5  # addresses; chunks and members of two kinds
    optimizer.step()
    assert len(uploads) == 5
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    assert len(uploads) == 6  # addresses only
    assert [int(optimizer.state[p]["step"]) for p in params] == [3] * 5


def test_a_part_of_the_parameters(device: str) -> None:
    """A part's step has the bits of a step of all, whatever gradients the others have."""
    params = [torch.nn.Parameter(torch.ones(n, device=device).bfloat16()) for n in (4100, 9, 30, 4096)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    parted, whole = (
        AdamW8bit([{"params": of[:2]}, {"params": of[2:], "lr": 0.2}], lr=0.1) for of in (params, copies)
    )
    for p, q in zip(params, copies, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    parted.found_inf = torch.tensor([0.0, 1.0], device=device)
    parted.step_part([params[1], params[3]])
    parted.found_inf = torch.zeros(3, device=device)
    parted.step_part([params[0], params[2], params[3]])
    whole.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


@pytest.mark.usefixtures("_launches")
def test_parts_that_come_back_keep_their_tables(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step taken part by part; the parts of longest ago are forgotten."""
    params = [torch.nn.Parameter(torch.randn(n, device=device).bfloat16()) for n in (4096, 9, 4112, 31)]
    optimizer = AdamW8bit(params)
    grads = [torch.randn_like(p) for p in params]
    made = []
    make_plan = op.make_plan
    monkeypatch.setattr(op, "make_plan", lambda *args: made.append(args) or make_plan(*args))
    monkeypatch.setattr(op, "MOST_PLANS", 2)

    def step(*part: int) -> None:
        for i, p in enumerate(params):
            p.grad = grads[i] if i in part else None
        optimizer.step()

    for _ in range(3):
        step(0, 1)
        step(2, 3)
    assert len(made) == 2
    step(0, 2)
    step(2, 3)
    assert len(made) == 3
    step(0, 1)
    assert len(made) == 4
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 4, 5, 4]


def test_fake_tensors_are_stepped_without_being_computed(device: str) -> None:
    """What a memory trace sees: the states, made at the first step, and nothing else of their size."""
    book.code_book.cache_clear()
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(1 << 20, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        optimizer = AdamW8bit([p], max_update_rms=1.0)
        optimizer.found_inf = torch.zeros(1)
        made = _Made()
        with made:
            optimizer.step()
            assert made.bytes < 2.1 * 2**20
            made.bytes = 0
            optimizer.step()
        assert made.bytes < 1000
    assert not isinstance(book.code_book(True, torch.device("cpu")), FakeTensor)


class _Made(TorchDispatchMode):
    """Adds up the bytes of new tensors."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.bytes += out.numel() * out.element_size()
        return out


class _NoSync(TorchDispatchMode):
    """Fails on the operations by which a host reads a device tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"), (
            func.name()
        )
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing(device: str) -> None:
    """Neither the flag nor step, lr and seed; the plain path has to, and the mode notices."""
    p = torch.nn.Parameter(torch.ones(4096, device=device).bfloat16())
    optimizer = AdamW8bit([p], max_update_rms=0.1)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.grad_scale = torch.ones((), device=device)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    if backend(device).name == "eager":
        with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoSync():
            optimizer.step()
    else:
        with _NoSync():
            optimizer.step()
        assert int(optimizer.state[p]["step"]) == 2


# --- What stochastic rounding is for ---


def test_pure_bf16_follows_fp32_at_lr_1e_6(device: str) -> None:
    """Weights ~ N(0, 0.02), gradients of one sign: nearly all updates are below half a bf16 ulp.

    Rounding to nearest loses most of the way; stochastic rounding makes it on average, as far as fp32 AdamW.
    """
    count, steps, lr = 2**16, 6, 1e-6
    start = (0.02 * torch.randn(count)).bfloat16()
    direction = torch.randn(count).sign()
    moved = {}
    for name in ("fp32", "nearest", "stochastic"):
        p = torch.nn.Parameter(start.clone().to(device, torch.float32 if name == "fp32" else start.dtype))
        optimizer: torch.optim.Optimizer
        if name == "fp32":
            optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=0.0)
        else:
            optimizer = AdamW8bit(
                [p], lr=lr, weight_decay=0.0, seed=5, stochastic_rounding=name == "stochastic"
            )
        for _ in range(steps):
            p.grad = direction.to(p) * 1e-3
            optimizer.step()
        moved[name] = (p.detach().cpu().double() - start.double()) * -direction.double()
    full = float(moved["fp32"].mean())
    assert full == pytest.approx(steps * lr, rel=0.02)
    assert float(moved["nearest"].mean()) < 0.2 * full
    noise = float(moved["stochastic"].std()) / math.sqrt(count)
    assert abs(float(moved["stochastic"].mean()) - full) < 4 * noise
    assert noise < 0.05 * full


def test_resumed_equals_uninterrupted(device: str) -> None:
    """Step and seed are part of the state, so the random bits go on where they were."""
    generator = torch.Generator().manual_seed(2)
    grads = [[torch.randn(n, generator=generator) for n in (4100, 9)] for _ in range(4)]

    def build() -> tuple[list[torch.nn.Parameter], AdamW8bit]:
        params = [torch.nn.Parameter(torch.ones(n, device=device).bfloat16()) for n in (4100, 9)]
        return params, AdamW8bit(params, lr=1e-3, seed=11)

    def run(params: list[torch.nn.Parameter], optimizer: AdamW8bit, steps: range) -> None:
        for step in steps:
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g.to(p)
            optimizer.step()

    straight, optimizer = build()
    run(straight, optimizer, range(4))
    first, optimizer = build()
    run(first, optimizer, range(2))
    second, resumed = build()
    resumed.param_groups[0]["seed"] = 99
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    run(second, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(straight, second, strict=True))
    other, optimizer = build()
    optimizer.param_groups[0]["seed"] = 12
    run(other, optimizer, range(1))
    again, optimizer = build()
    run(again, optimizer, range(1))
    assert not torch.equal(other[0], again[0])


def test_a_copy_goes_on_by_itself(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(4100, device=device).bfloat16())
    p.grad = torch.ones_like(p)
    optimizer = AdamW8bit([p], lr=1e-2)
    optimizer.step()
    copy = pickle.loads(pickle.dumps(optimizer))
    (q,) = copy.param_groups[0]["params"]
    q.grad = p.grad.clone()
    before = p.detach().clone()
    copy.step()
    assert torch.equal(p, before)
    optimizer.step()
    assert torch.equal(p, q)


# --- Registration ---


def test_a_gradient_scaler_needs_no_host_read(device: str) -> None:
    """`torch.amp.GradScaler` leaves the decision to the optimizer, which takes it on the device."""
    p = torch.nn.Parameter(torch.ones(5000, device=device))
    optimizer = AdamW8bit([p], lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=100)
    for factor in (1.0, math.inf, 1.0):
        p.grad = None
        scaler.scale((p * factor).sum()).backward()
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) == (factor == math.inf)
    assert int(optimizer.state[p]["step"]) == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:The CUDA Graph is empty")
def test_a_cuda_graph_replays_the_schedule() -> None:
    """Step, lr and random bits advance in replays; and the whole step waits for nothing."""
    torch.use_deterministic_algorithms(False)
    params = [torch.nn.Parameter(torch.ones(n, device="cuda").bfloat16()) for n in (9000, 9, 4096)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    lr = torch.tensor(1e-2, device="cuda", dtype=torch.float64)
    eager, captured = AdamW8bit(params, lr=lr), AdamW8bit(copies, lr=lr)
    for p, q in zip(params, copies, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    eager.step()
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(3):
        lr.fill_(1e-2 / (1 + step))
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager.step()
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    copies[0].grad = params[0].grad.clone()  # the gradients have moved: a new graph has a table of its own
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again, capture_error_mode="relaxed"):
        captured.step()
    kept = captured.take_captured()
    eager.step()
    again.replay()
    assert len(kept) == 2
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


# --- Bad input ---


def broken(**changes: Any) -> dict[str, Any]:
    sizes, kinds = (4100, 6), (torch.uint8, torch.float32)
    moments = {
        name: [torch.zeros(n, dtype=k) for n, k in zip(sizes, kinds, strict=True)]
        for name in ("state1", "state2")
    }
    maxima = {name: [torch.zeros(17), torch.zeros(0)] for name in ("absmax1", "absmax2")}
    good = {
        "params": [torch.randn(n).bfloat16() for n in sizes],
        "grads": [torch.randn(n) for n in sizes],
        "steps": [torch.zeros((), dtype=torch.int64) for _ in sizes],
    }
    return good | moments | maxima | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": [torch.zeros(4100)]}, ValueError, r"different lengths: \[2, 1, 2"),
        (
            {"params": [torch.zeros(4100).long(), torch.zeros(6)]},
            TypeError,
            "parameter 0 of shape .4100,.: dtype",
        ),
        (
            {"grads": [torch.zeros(4100), torch.zeros(7)]},
            ValueError,
            "parameter 1 of shape .6,.: gradient .7,.",
        ),
        ({"grads": [torch.zeros(4100), torch.zeros(6, device="meta")]}, ValueError, "must all be on cpu"),
        (
            {"grads": [torch.zeros(4100), torch.zeros(12)[::2]]},
            ValueError,
            "parameter 1 .* make them contiguous",
        ),
        ({"state1": [torch.zeros(4100), torch.zeros(6)]}, TypeError, "both must be uint8 or fp32"),
        ({"absmax2": [torch.zeros(16), torch.zeros(0)]}, ValueError, r"pass fp32 \(17,\)"),
        ({"steps": [torch.zeros(()), torch.zeros(())]}, TypeError, "step is torch.float32"),
    ],
)
def test_bad_tensors(changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        adamw8bit_(**broken(**changes), lr=torch.tensor(1e-3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"eps": -1e-8},
        {"weight_decay": -1},
        {"max_update_rms": 0.0},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: .* is out of range"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3))], **setting)


def test_a_state_of_other_parameters_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(4100))
    p.grad = torch.ones_like(p)
    optimizer = AdamW8bit([p])
    optimizer.step()
    with pytest.raises(ValueError, match="parameter groups"):
        AdamW8bit([p, torch.nn.Parameter(torch.zeros(3))]).load_state_dict(optimizer.state_dict())
    q = torch.nn.Parameter(torch.zeros(4200))
    q.grad = torch.ones_like(q)
    other = AdamW8bit([q])
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(4200,\): its state has shape \(4100,\)"):
        other.step()


@pytest.mark.parametrize("table", ["code_book", "both_books", "_cpu_table"])
def test_tables_made_while_nothing_is_computed_are_whole(table: str) -> None:
    """A planner's trace runs the step without its arithmetic; what is cached meanwhile serves real steps."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} is part of the trace")

    make = getattr(book, table).__wrapped__  # without the cache
    cpu = torch.device("cpu")
    arguments = {"code_book": (True, cpu), "both_books": (cpu,), "_cpu_table": (True,)}[table]
    with Nothing():
        made = make(*arguments)
    assert torch.equal(made, make(*arguments))
    assert made.unique().numel() > 100
