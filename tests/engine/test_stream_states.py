"""Optimizer states in host memory: the same steps, whatever the copies' timing and the order of groups."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapo_fast.engine import stream_states
from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.stream_states import StateStreaming
from mapo_fast.engine.transfers import Transfers
from tests.delayed_transfers import DelayedTransfers
from tests.engine.test_fused_step import FUSABLE, equal, fused, optimizer_of, simple_loss, values

SHAPES = [(96, 64), (7,), (16, 8, 9, 9), (70, 60), (33,), (4100,)]
"""8-bit states from 4,096 elements on; the last group of these is a small one."""
GROUP = 30_000
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _everything_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_states, "_SMALLEST", 1)


def parameters(seed: int = 3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    made[2].data = made[2].data.to(memory_format=torch.channels_last)
    return made


def streamed(name: str, weights: list[nn.Parameter], transfers: Transfers) -> FusedStep:
    optimizer = optimizer_of(name, weights)
    states = StateStreaming(optimizer, transfers, group_bytes=GROUP)
    return FusedStep(optimizer, weights, max_grad_norm=1.0, states=states, group_bytes=GROUP)


def take(step: FusedStep, weights: list[nn.Parameter], number: int, left_out: int | None = None) -> None:
    factors = (1.0,) * len(weights)
    loss = simple_loss(weights, number, factors)
    if left_out is not None:  # no gradient, so the groups are others
        kept = [p for i, p in enumerate(weights) if i != left_out]
        loss = simple_loss(kept, number, factors[1:])
    step.backward(loss)
    step.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Transfers, DelayedTransfers])
@pytest.mark.parametrize("name", FUSABLE)
def test_bitwise_the_steps_with_states_on_the_device(name: str, kind: type[Transfers]) -> None:
    """Also where the groups change, and whatever is left in the buffers between steps."""
    resident, moving = parameters(), parameters()
    plain, step = fused(name, resident, limit=1.0), streamed(name, moving, kind(CPU))
    assert step.states is not None
    for number, left_out in enumerate((None, None, 3, None, None)):
        take(plain, resident, number, left_out)
        take(step, moving, number, left_out)
        if kind is Transfers:  # the other one spoils by itself what is on its way
            for buffer in step.states.buffers:
                buffer.fill_(255)
    step.states.transfers.synchronize()
    assert equal(values(resident, plain.optimizer), values(moving, step.optimizer))


class _Counting(Transfers):
    def __init__(self) -> None:
        super().__init__(CPU)
        self.fetched = self.stored = self.made = 0

    def empty_host(self, *args: Any) -> Tensor:
        self.made += 1
        return super().empty_host(*args)

    def fetch(self, dst: Tensor, src: Tensor) -> Any:
        self.fetched += src.nbytes
        return super().fetch(dst, src)

    def store(self, dst: Tensor, src: Tensor) -> Any:
        self.stored += src.nbytes
        return super().store(dst, src)


@pytest.mark.slow
def test_states_travel_once_a_step_through_two_buffers() -> None:
    """Every fetch is the one that was expected; memory is made once, for 200 steps."""
    weights, transfers = parameters(), _Counting()
    step = streamed("adamw", weights, transfers)
    states = step.states
    assert states is not None
    total = sum(states.nbytes(p) for p in weights)
    assert total >= sum(2 * p.nbytes for p in weights)
    assert [b.numel() for b in states.buffers] == [2 * weights[2].nbytes] * 2
    made = transfers.made
    assert made == len(weights)
    homes = {id(t): t.data_ptr() for p in weights for t in step.optimizer.state[p].values()}
    for number in range(200):
        take(step, weights, number)
        assert transfers.fetched == transfers.stored == total * (number + 1)
        assert len(step._pending) == len(states._fetched) == 0
    assert transfers.made == made
    assert homes == {id(t): t.data_ptr() for p in weights for t in step.optimizer.state[p].values()}


def test_next_groups_are_on_their_way_during_an_update() -> None:
    weights, transfers = parameters(), DelayedTransfers()
    step = streamed("adamw8bit", weights, transfers)
    states = step.states
    assert states is not None
    seen: list[int] = []
    update = step.optimizer.update_group

    def look(group: Any, *rest: Any) -> None:
        seen.append(sum(copy.inwards for copy in transfers.pending))
        update(group, *rest)

    step.optimizer.update_group = look  # type: ignore[method-assign]
    take(step, weights, 0)
    assert set(seen) == {0}
    groups = len(seen)
    seen.clear()
    take(step, weights, 1)
    assert groups > 2
    assert all(seen[:-1])
    assert seen[-1] == 0


def test_small_states_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_states, "_SMALLEST", 10_000)
    weights = parameters()
    step = streamed("adamw8bit", weights, Transfers(CPU))
    assert step.states is not None
    assert [step.states.nbytes(p) > 0 for p in weights] == [True, False, True, False, False, False]
    take(step, weights, 0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["streamed", "resident"])
@pytest.mark.parametrize("name", FUSABLE)
def test_resumed_equals_uninterrupted(name: str, target: str) -> None:
    """From host memory into host memory, and into a run with the states on the device."""
    straight = parameters()
    one = streamed(name, straight, DelayedTransfers())
    for number in range(4):
        take(one, straight, number, left_out=5)
    weights = parameters()
    half = streamed(name, weights, DelayedTransfers())
    for number in range(2):
        take(half, weights, number, left_out=5)
    tensors, state = half.state()

    again = [nn.Parameter(p.detach().clone()) for p in weights]
    resumed = (
        streamed(name, again, DelayedTransfers()) if target == "streamed" else fused(name, again, limit=1.0)
    )
    if resumed.states is not None:
        take(resumed, again, 9)  # what is there already must not matter
    with torch.no_grad():
        for p, q in zip(again, weights, strict=True):
            p.copy_(q)
    homes = {t.untyped_storage().data_ptr() for p in again for t in resumed.optimizer.state[p].values()}
    resumed.restore(sorted(tensors.items()), json.loads(json.dumps(state)))
    if resumed.states is not None:
        large = [
            t
            for p in again
            for k, t in resumed.optimizer.state[p].items()
            if k not in ("step", "qmap1", "qmap2")
        ]
        assert {t.untyped_storage().data_ptr() for t in large} <= homes
    for number in range(2, 4):
        take(resumed, again, number, left_out=5)
    for step in (one, resumed):
        step.state()  # waits for copies
    assert equal(values(straight, one.optimizer), values(again, resumed.optimizer))


def test_a_state_of_another_type_moves_to_the_host_too() -> None:
    weights = parameters()
    step = streamed("adamw", weights, Transfers(CPU))
    take(step, weights, 0)
    tensors, state = step.state()
    wide = {key: t.double() if "exp" in key else t for key, t in tensors.items()}
    step.restore(wide.items(), json.loads(json.dumps(state)))
    assert step.states is not None
    for i, p in enumerate(weights):
        found = step.optimizer.state[p]["exp_avg"]
        assert found.dtype == torch.float64
        assert torch.equal(found, wide[f"{i}.exp_avg"])
        assert found.untyped_storage()._cdata == step.states._homes[p].memory.untyped_storage()._cdata


def test_a_group_larger_than_a_buffer_is_refused() -> None:
    weights = parameters()
    states = StateStreaming(optimizer_of("adamw", weights), Transfers(CPU), group_bytes=100)
    with (
        pytest.raises(ValueError, match=r"the group's states have .* bytes, a buffer has"),
        states.visiting(weights),
    ):
        pass
