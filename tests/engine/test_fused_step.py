"""The step fused into backward takes the steps of the one after it, with less memory."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mapo_fast.engine import stream_states, stream_weights
from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.optim import GuardedOptimizer, build_optimizer
from mapo_fast.engine.stream_states import StateStreaming
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import OptimConfig
from tests.delayed_transfers import DelayedTransfers
from tests.unets import inputs, make_unet

FUSABLE = [name for name, known in OPTIMIZERS.items() if known.fused_step]
GROUP = 20_000
"""Bytes: a dozen groups in the tiny UNets."""


def optimizer_of(name: str, parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    config = OptimConfig(name=name, lr=1e-2, **settings)
    return build_optimizer(config, parameters, seed=5)


def fused(name: str, parameters: list[nn.Parameter], limit: float = 0.0, **settings: Any) -> FusedStep:
    optimizer = optimizer_of(name, parameters, **settings)
    return FusedStep(optimizer, parameters, max_grad_norm=limit, group_bytes=GROUP)


def loss_of(unet: Any, step: int) -> Tensor:
    dtype = unet.conv_in.weight.dtype
    latents, others = inputs("sdxl", dtype, seed=step)
    out = unet(latents, **others).sample
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(step))
    return (out.float() - target).square().mean()


def simple(sizes: tuple[int, ...] = (5000, 7, 4100, 33)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]


def simple_loss(parameters: list[nn.Parameter], step: int, factors: tuple[float, ...] = (1.0,) * 4) -> Tensor:
    """Every factor is multiplied into one parameter's gradient and not into the loss."""
    total = torch.zeros(())
    for i, (p, factor) in enumerate(zip(parameters, factors, strict=True)):
        weights = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        total = total + (_Times.apply(p, factor) * weights.to(p)).float().sum()
    return total


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


def values(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [t for p in parameters for _, t in sorted(optimizer.state[p].items()) if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*parameters, *states)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        ("adamw", "split", torch.float32),
        ("adamw8bit", "joint", torch.float32),
        ("adamw8bit", "split", torch.bfloat16),
        ("adafactor", "split", torch.float32),
    ],
    ids=str,
)
def test_bitwise_the_step_after_backward(name: str, layout: Any, dtype: torch.dtype) -> None:
    """Every parameter and state, also the random bits of rounding, and each step is counted once."""
    settings: dict[str, Any] = {"max_update_rms": 0.5} if name == "adamw8bit" else {}
    found = []
    for build in (fused, _guarded):
        unet = make_unet("sdxl", dtype=dtype)
        apply_layout(unet, layout, gradient_checkpointing=True)
        parameters = list(unet.parameters())
        step = build(name, parameters, **settings)
        norms = []
        for i in range(2):
            step.backward(loss_of(unet, i))
            norms.append(step.step())
        found.append((values(parameters, step.optimizer), norms))
        assert all(p.grad is None for p in parameters)
        assert {int(step.optimizer.state[p]["step"]) for p in parameters} == {2}
    (ours, norms), (theirs, expected) = found
    assert equal(ours, theirs)
    for norm, reference in zip(norms, expected, strict=True):
        torch.testing.assert_close(
            norm, reference.float(), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0
        )


def _guarded(name: str, parameters: list[nn.Parameter], **settings: Any) -> GuardedOptimizer:
    optimizer = optimizer_of(name, parameters, **settings)
    return GuardedOptimizer(optimizer, parameters, max_grad_norm=0.0, scaler=None)


def test_gradients_never_exist_at_once() -> None:
    """At most a group's and one more; and groups are no smaller than they have to be."""
    unet = make_unet("sdxl", dtype=torch.float32)
    parameters = list(unet.parameters())
    live: list[int] = []

    def look(_: Tensor) -> None:
        live.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for p in parameters:
        p.register_post_accumulate_grad_hook(look)
    step = fused("adamw", parameters)
    groups = []
    update = step.optimizer.update_group

    def noted(group: Sequence[Tensor], *rest: Any) -> None:
        groups.append(sum(p.nbytes for p in group))
        update(group, *rest)

    step.optimizer.update_group = noted  # type: ignore[method-assign]
    step.backward(loss_of(unet, 0))
    step.step()
    largest = max(p.nbytes for p in parameters)
    everything = sum(p.nbytes for p in parameters)
    assert len(live) == len(parameters)
    assert max(live) <= GROUP + largest < everything / 5
    assert sum(groups) == everything
    assert max(groups) <= max(GROUP, largest)
    assert all(a + b > GROUP for a, b in itertools.pairwise(groups))


@pytest.mark.parametrize("name", FUSABLE)
def test_a_loss_that_is_not_finite_changes_nothing(name: str) -> None:
    parameters = simple()
    step = fused(name, parameters, limit=1.0)
    step.backward(simple_loss(parameters, 0))
    norm = float(step.step())
    before = values(parameters, step.optimizer)
    for bad in (math.nan, math.inf):
        step.backward(simple_loss(parameters, 1) + bad)  # the gradients are finite
        assert math.isnan(float(step.step()))
    assert equal(before, values(parameters, step.optimizer))
    assert all(p.grad is None for p in parameters)
    assert [float(t) for t in (step.skipped, step.skipped_in_a_row, step.skipped_tensors)] == [2, 2, 0]
    assert float(step._norm) == norm
    step.backward(simple_loss(parameters, 1))
    step.step()
    assert not equal(before, values(parameters, step.optimizer))
    assert [float(t) for t in (step.skipped, step.skipped_in_a_row, step.skipped_tensors)] == [2, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", FUSABLE)
def test_a_gradient_that_is_not_finite_skips_its_tensor(name: str, bad: float) -> None:
    """The others, also of the same group, take the step they take otherwise."""
    found = []
    for factor in (1.0, bad):
        parameters = simple()
        step = fused(name, parameters)
        step.backward(simple_loss(parameters, 0))
        step.step()
        before = values(parameters, step.optimizer)
        step.backward(simple_loss(parameters, 1, (1.0, factor, factor, 1.0)))
        norm = float(step.step())
        found.append((parameters, step, before, norm))
    (plain, all_of_them, *_), (parameters, step, before, norm) = found
    assert not math.isfinite(norm)
    for i, (p, q) in enumerate(zip(parameters, plain, strict=True)):
        mine, theirs = step.optimizer.state[p], all_of_them.optimizer.state[q]
        if i in (1, 2):
            assert torch.equal(p, before[i])
            assert int(mine["step"]) == 1
        else:
            assert torch.equal(p, q)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
            assert int(mine["step"]) == 2
    assert [float(t) for t in (step.skipped, step.skipped_in_a_row, step.skipped_tensors)] == [0, 1, 2]
    step.backward(simple_loss(parameters, 2))
    step.step()
    assert [float(t) for t in (step.skipped, step.skipped_in_a_row, step.skipped_tensors)] == [0, 0, 2]


@pytest.mark.parametrize("name", FUSABLE)
def test_clipping_is_by_the_norm_of_the_step_before(name: str) -> None:
    limit = 2.0
    parameters, copies = simple(), simple()
    step = fused(name, parameters, limit=limit)
    plain = optimizer_of(name, copies)
    scale = 1.0
    for i in range(3):
        step.backward(simple_loss(parameters, i))
        norm = float(step.step())
        simple_loss(copies, i).backward()
        assert norm == pytest.approx(float(torch.nn.utils.get_total_norm([p.grad for p in copies])), rel=1e-5)
        for p in copies:
            assert p.grad is not None
            p.grad /= scale
        plain.step()
        plain.zero_grad()
        for p, q in zip(parameters, copies, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        scale = norm / limit
        assert scale > 10


def test_a_step_is_one_backward() -> None:
    parameters = simple()
    step = fused("adamw", parameters)
    step.backward(simple_loss(parameters, 0))
    with pytest.raises(RuntimeError, match="one backward a step"):
        step.backward(simple_loss(parameters, 0))


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    parameters = simple()
    step = fused("adamw8bit", parameters)
    before = parameters[2].detach().clone()
    step.backward(simple_loss(parameters, 0, (1.0, 1.0, 1.0, 1.0)) * 0 + (parameters[0] * 2).sum())
    step.step()
    step.backward((parameters[1] * 2).sum())
    step.step()
    assert [int(step.optimizer.state[p]["step"]) for p in parameters] == [1, 2, 1, 1]
    assert not torch.equal(before, parameters[2])  # weight decay


@pytest.mark.parametrize("name", FUSABLE)
def test_resumed_equals_uninterrupted(name: str) -> None:
    def go_on(parameters: list[nn.Parameter], step: FusedStep, steps: range) -> None:
        for i in steps:
            factor = math.nan if i == 1 else 1.0
            step.backward(simple_loss(parameters, i, (1.0, factor, 1.0, 1.0)))
            step.step()

    straight = simple()
    one = fused(name, straight, limit=1.0)
    go_on(straight, one, range(4))
    first = simple()
    half = fused(name, first, limit=1.0)
    go_on(first, half, range(2))
    tensors, state = half.state()
    second = simple()
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    resumed = fused(name, second, limit=1.0)
    resumed.restore(((key, t.clone()) for key, t in tensors.items()), json.loads(json.dumps(state)))
    go_on(second, resumed, range(2, 4))
    assert equal(values(straight, one.optimizer), values(second, resumed.optimizer))
    assert float(resumed.skipped_tensors) == 1
    assert torch.equal(one._norm, resumed._norm)


@pytest.mark.parametrize("name", FUSABLE)
@pytest.mark.parametrize("way", ["to fused", "from fused"])
def test_a_run_may_go_on_with_or_without_fusing(way: str, name: str) -> None:
    """Also where a parameter has had no gradient so far."""
    builders: list[Callable[..., Any]] = [_guarded, fused]
    if way == "from fused":
        builders.reverse()
    parameters = simple()
    before = builders[0](name, parameters)
    before.backward(simple_loss(parameters[:3], 0, (1.0,) * 3))
    before.step()
    parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
    after = builders[1](name, parameters)
    tensors, state = before.state()
    after.restore(tensors.items(), json.loads(json.dumps(state)))
    after.backward(simple_loss(parameters, 1))
    after.step()
    assert [int(after.optimizer.state[p]["step"]) for p in parameters] == [2, 2, 2, 1]


class _NoSync(TorchDispatchMode):
    """Fails on the operations by which a host reads a device tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"), (
            func.name()
        )
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing() -> None:
    """AdamW; AdamW8bit reads nothing where its kernels run (`tests/kernels/test_adamw8bit.py`)."""
    parameters = simple()
    step = fused("adamw", parameters, limit=1.0)
    loss = simple_loss(parameters, 0)
    with _NoSync():
        step.backward(loss)
        step.step()
    loss = simple_loss(parameters, 1)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoSync():
        float(loss)


@pytest.mark.slow
@pytest.mark.parametrize("group_bytes", [1, 3000, 1 << 30])
def test_streamed_weights_go_back_unit_by_unit(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the groups: a unit is stored once a step, while its slot holds it, and so are its states."""
    monkeypatch.setattr(stream_weights, "STREAMED_BYTES", 1)
    monkeypatch.setattr(stream_states, "_SMALLEST", 1)
    found = []
    for streaming in (False, True):
        unet = make_unet("sdxl", dtype=torch.float32)
        transfers = DelayedTransfers()
        weights = WeightStreaming(unet, transfers) if streaming else None
        parameters = list(unet.parameters())
        optimizer = optimizer_of("adamw", parameters)
        states = StateStreaming(optimizer, transfers, group_bytes=group_bytes) if streaming else None
        step = FusedStep(
            optimizer,
            parameters,
            max_grad_norm=0.0,
            states=states,
            weights=weights,
            group_bytes=group_bytes,
        )
        updated = mock.Mock(wraps=getattr(weights, "updated", None))
        if weights is not None:
            monkeypatch.setattr(weights, "updated", updated)
        for i in range(2):
            step.backward(loss_of(unet, i))
            step.step()
        if weights is not None:
            stored = [call.args[0] for call in updated.call_args_list]
            assert stored == 2 * weights.units[::-1]
        found.append((weights or unet).state_dict())
    plain, streamed = found
    assert all(torch.equal(plain[name], streamed[name]) for name in plain)
