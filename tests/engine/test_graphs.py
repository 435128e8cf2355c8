"""A captured step takes the steps of the eager one: on a GPU, and with a graph played by torch on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mapo_fast.engine import graphs
from mapo_fast.engine.build import prepare_unet, with_start_model
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.graphs import Captured, StepGraphs, check_capture
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import Precision
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_kernels.ops import adamw8bit
from tests.engine.pair_steps import pair_of_inputs
from tests.engine.test_engine import CPU, settings
from tests.tiers import some_of
from tests.unets import SHALLOW, make_unet

PLANS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "joint adamw": ({}, torch.float32),
    "split adamw fused": ({"layout": "split", "checkpointing": True, "fused": True}, torch.float32),
    "joint adamw8bit": ({"optimizer": "adamw8bit", "checkpointing": True}, torch.bfloat16),
    "split adamw8bit fused": (
        {"optimizer": "adamw8bit", "layout": "split", "checkpointing": True, "fused": True},
        torch.bfloat16,
    ),
    "sequential lora": ({"kind": "lora", "layout": "sequential"}, torch.float32),
    "dpo adapter": ({"kind": "lora"}, torch.float32),
    "dpo copy": ({}, torch.float32),
    "dpo precomputed": ({}, torch.float32),
    "kto adapter": ({"kind": "lora", "layout": "sequential"}, torch.float32),
    "kto copy": ({}, torch.float32),
    "kto precomputed": ({"layout": "sequential"}, torch.float32),
}
"""Objectives that need a reference come with its kind."""
LIKE_OTHERS = ("split adamw fused", "joint adamw8bit", "dpo copy", "kto adapter", "kto precomputed")
"""Plans each of whose settings another plan has."""
SHAPES = [(2, 8), (2, 8), (1, 12), (2, 8), (1, 12), (1, 12), (2, 8)]
"""Pairs and side of the steps: each is run, captured and replayed, in turns."""
BAD = 4
"""A step whose target is not finite."""


class Tape(TorchDispatchMode):  # type: ignore[misc]
    """Keeps every operation with its arguments, as a CUDA graph keeps kernels with theirs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Do them again, with the results where they were the first time."""
        for func, args, kwargs, out in self.operations:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                    old.copy_(new)


@pytest.fixture(autouse=True)
def eight_bit_steps_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain torch they read numbers on the host; on a GPU they are kernels on the same tensors."""
    step = adamw8bit.eager_step

    def recorded(*args: Any) -> None:
        tape = torch.utils._python_dispatch._get_current_dispatch_mode()
        with _disable_current_modes():
            step(*args)
        if isinstance(tape, Tape):
            tape.operations.append((step, args, {}, None))

    monkeypatch.setattr(adamw8bit, "eager_step", recorded)


class PlayedGraphs(StepGraphs):
    """CUDA graphs without CUDA. Recording computes, so what it has changed is put back."""

    persistent: Any = None
    """Returns the tensors that a step changes."""
    captures = 0

    def _first(self, tensors: Sequence[Tensor | None]) -> Any:
        return self._step(tensors)

    @torch.no_grad()
    def _capture(self, inputs: list[Tensor | None]) -> Captured:
        self.captures += 1
        for x in inputs:
            if x is not None:
                x.zero_()
        changed = self.persistent()
        before = [x.clone() for x in changed]
        with torch.enable_grad(), Tape() as tape:
            result = self._step(inputs)
        for x, old in zip(changed, before, strict=True):
            x.copy_(old)
        return Captured(tape.replay, inputs, result, (tape, self._keep()))

    def _wait(self) -> None:
        pass


def build(plan: str, device: torch.device) -> tuple[Engine, torch.dtype]:
    arguments, dtype = PLANS[plan]
    config = settings(**arguments)
    changes: dict[str, Any] = {"optim": config.optim.model_copy(update={"max_grad_norm": 0.5})}
    if plan.startswith(("dpo", "kto")):
        name, reference = plan.split()
        objective = {"name": name, "reference": reference, "beta": 1.0}  # no sigmoid saturates
        changes["objective"] = config.objective.model_copy(update=objective)
    config = config.model_copy(update=changes)
    precision = Precision(dtype, dtype, None, scaled=False)

    def unet() -> Any:
        return make_unet("sdxl", dtype=dtype, **SHALLOW)

    parts = prepare_unet(unet(), config, precision, device)
    parts = with_start_model(parts, config, unet)
    return Engine(config, parts, build_loss(config.objective, 1000), precision, device), dtype


def changed_by(engine: Engine) -> list[Tensor]:
    guard, states = engine.optimizer, engine.optimizer.optimizer.state
    kept = [x for part in (guard, engine.baseline) if part for x in vars(part).values()]
    counters = [x for x in kept if isinstance(x, Tensor)]
    return [*engine.parameters, *counters, *tree_leaves([dict(s) for s in states.values()])]


def steps_of(engine: Engine) -> list[Tensor]:
    """What a run shows: losses and norms, then what a checkpoint holds."""
    objective, shown = engine.config.objective, []
    for number, (pairs, side) in enumerate(SHAPES):
        inputs = pair_of_inputs(pairs, torch.float32, side)
        inputs = inputs._replace(target=inputs.target * (float("nan") if number == BAD else 1 + 0.1 * number))
        given: dict[str, Tensor] = {}
        if engine.config.reference == "precomputed":
            given["reference_errors"] = 1 + 0.1 * number * torch.arange(2.0 * pairs)
        if objective.known.samples == "single":
            given["labels"] = torch.arange(2 * pairs) % (2 + number) == 0
        engine.start(2.0**-10 / (1 + number % 2))
        out = engine.accumulate(
            type(inputs)(*(x.to(engine.device) for x in inputs)),
            1.0,
            **{name: x.to(engine.device) for name, x in given.items()},  # type: ignore[arg-type]
        )
        shown += [x.detach().clone() for x in out if x is not None]
        shown.append(engine.finish().clone())
    guard = engine.optimizer
    assert float(guard.skipped) == 1
    if engine.baseline is not None:
        shown.append(torch.tensor(engine.baseline.state()))
    return [*shown, guard.skipped, guard.skipped_in_a_row, *(p.detach() for p in engine.parameters)]


def assert_equal_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("plan", some_of(PLANS, LIKE_OTHERS))
def test_nothing_that_changes_is_fixed_in_a_graph(plan: str) -> None:
    """Learning rate, step counts, random bits, clipping by the step before, skipped steps, inputs."""
    wanted = steps_of(build(plan, CPU)[0])
    engine, _ = build(plan, CPU)
    engine._capture_steps(PlayedGraphs)
    played: Any = engine._graphs
    played.persistent = lambda: changed_by(engine)
    assert_equal_bits(steps_of(engine), wanted)
    assert played.captures == 2


def test_the_shape_not_used_for_longest_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    played = PlayedGraphs(lambda tensors: tensors[0] * 2, CPU)  # type: ignore[operator]
    played.persistent = list
    for size in (1, 2, 3, 1, 2, 1, 3, 1, 2):  # the first three run as they are, then two of three have room
        assert torch.equal(played([torch.full((size,), 5.0)]), torch.full((size,), 10.0))
    assert played.captures == 4


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_graphs_on_a_gpu_take_the_same_steps(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else it may add up in any order
    device = torch.device("cuda")
    wanted = steps_of(build(plan, device)[0])
    engine, _ = build(plan, device)
    engine._capture_steps(StepGraphs)
    assert_equal_bits(steps_of(engine), wanted)


def captured(config: Config, **sections: dict[str, Any]) -> Config:
    changes = {"speed": {"cuda_graph": True}, **sections}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=to) for name, to in changes.items()}
    )


def test_a_capture_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU; or set speed\.cuda_graph = false$"):
        check_capture(captured(settings()), torch.device("cpu"))


def test_every_other_plan_can_be_captured() -> None:
    for layout, fused in itertools.product(("joint", "split", "sequential"), (False, True)):
        if not (fused and layout == "sequential"):
            plan = settings(layout=layout, checkpointing=True, fused=fused)
            check_capture(captured(plan), torch.device("cuda"))
