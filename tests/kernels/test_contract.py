"""What every operator keeps, whatever it computes; its own file says what that is.

Strides, empty tensors, NaN, reproducible bits, torch's checks of operators, compiling and checkpointing. The
operators are those of operators.py; in every implementation: see conftest.py.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.testing._internal.optests import generate_tests as optests
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import mapo_kernels
from mapo_kernels import ops
from tests.kernels.conftest import INTERPRETED
from tests.kernels.linear_cases import same_bits
from tests.kernels.operators import OPERATORS, Operator
from tests.tiers import some_of

UNITS = 3
CHECKS = ("test_schema", "test_faketensor") if INTERPRETED else optests.DEFAULT_TEST_UTILS
"""The other two are of an operator and not of its kernels."""

every = pytest.mark.parametrize("operator", OPERATORS, ids=str)
nan_in_fresh_memory = pytest.mark.usefixtures("_nan_in_fresh_memory")

Layout = Callable[[Tensor], Tensor]


def weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that arrive at these outputs, the same ones at each call."""
    return [torch.arange(y.numel(), device=y.device).to(y.dtype).sin().view(y.shape) for y in outputs]


def results(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], lay: Layout = lambda t: t
) -> list[Tensor]:
    """Outputs and all gradients; those that arrive are laid out in memory by `lay`."""
    outputs = function(*tensors)
    reached, wanted = ([t for t in each if t.requires_grad] for each in (outputs, tensors))
    arriving = [lay(g) for g in weights(reached)]
    found = torch.autograd.grad(reached, wanted, arriving) if reached else ()
    return [y.detach() for y in outputs] + list(found)


def fresh(tensors: Sequence[Tensor], change: Layout) -> list[Tensor]:
    return [change(t.detach()).requires_grad_(t.requires_grad) for t in tensors]


# --- Nothing is left out ---


class Dispatched(TorchDispatchMode):
    """Keeps the first arguments of each of our operators, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "mapo":
            self.arguments.setdefault(op, args)
        return op(*args, **(kwargs or {}))


def dispatched(operator: Operator, device: str) -> dict[Any, tuple[Any, ...]]:
    per_unit, shared, function = operator.call(UNITS, device)
    with Dispatched() as seen:
        results(function, [*per_unit, *shared])
    return seen.arguments


def test_every_operator_is_here() -> None:
    """Each public function of tensors, and each operator that torch knows, forward and backward."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    public = {name: getattr(mapo_kernels, name) for name in mapo_kernels.__all__}
    functions = {
        name
        for name, f in public.items()
        if inspect.isfunction(f)
        and f.__module__.startswith(ops.__name__)
        and "Tensor" in str(inspect.signature(f))
    }
    assert functions | {"AdamW8bit"} == {operator.public_name for operator in OPERATORS}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mapo::")}
    called = {op.name() for operator in OPERATORS for op in dispatched(operator, "cpu")}
    assert called == registered


# --- Values ---


def innermost(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, -1).contiguous().movedim(-1, dim) if x.ndim > dim else x


LAYOUTS: dict[str, Layout] = {
    "units innermost": lambda x: innermost(x, 0),
    "channels innermost": lambda x: innermost(x, 1),
    "every second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "slice": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.slow
@nan_in_fresh_memory
@every
@pytest.mark.parametrize("name", some_of(LAYOUTS, ["channels innermost", "slice"]))
def test_any_strides(device: str, operator: Operator, name: str) -> None:
    """Strides of all operands and arriving gradients, and of the first operand alone."""
    lay = LAYOUTS[name]
    per_unit, shared, function = operator.call(UNITS, device)
    tensors = [*per_unit, *shared]
    laid, dense = fresh(tensors, lay), fresh(tensors, lambda t: lay(t).contiguous())
    plain = results(function, dense, lambda g: lay(g).contiguous())
    for a, b in zip(results(function, laid, lay), plain, strict=True):
        torch.testing.assert_close(a, b)
    got = results(function, [laid[0], *dense[1:]], lambda g: lay(g).contiguous())
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b)


@nan_in_fresh_memory
@every
def test_empty(device: str, operator: Operator) -> None:
    """No units: empty outputs, and gradients of zero; or an error that says what is empty."""
    per_unit, shared, function = operator.call(0, device)
    if not operator.takes_nothing:
        with pytest.raises(ValueError, match=r"is empty|with B >= 1"):
            function(*per_unit, *shared)
        return
    outputs = function(*per_unit, *shared)
    assert [len(y) for y in outputs] == [0] * len(outputs)
    some = operator.call(1, device)
    assert [y.shape[1:] for y in outputs] == [
        y.shape[1:] for y in some.function(*some.per_unit, *some.shared)
    ]
    for grad in results(function, [*per_unit, *shared])[len(outputs) :]:
        assert not grad.any()


@pytest.mark.slow
@nan_in_fresh_memory
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.name != "paired_noise_epsilon"], ids=str)
def test_nan_and_inf_stay_in_their_unit_and_show(device: str, operator: Operator, value: float) -> None:
    per_unit, shared, function = operator.call(UNITS, device)
    bad = per_unit[0].detach().clone()
    bad[1].view(-1)[0] = value
    bad.requires_grad_(per_unit[0].requires_grad)
    clean, got = (results(function, [x, *per_unit[1:], *shared]) for x in (per_unit[0], bad))
    count = len(got) - sum(t.requires_grad for t in shared)
    assert any(not y[1::UNITS].isfinite().all() for y in got[:count])
    for want, y in zip(clean[:count], got[:count], strict=True):
        for unit in (0, 2):
            assert torch.equal(y[unit::UNITS], want[unit::UNITS])


@pytest.mark.slow
@nan_in_fresh_memory
@every
def test_same_bits_on_repeats(device: str, operator: Operator) -> None:
    per_unit, shared, function = operator.call(2 * UNITS, device)  # several programs add to one gradient
    first = results(function, [*per_unit, *shared])
    for _ in range(2):
        same_bits(results(function, [*per_unit, *shared]), first)


# --- torch ---


@pytest.mark.slow
@every
@pytest.mark.filterwarnings("ignore:.*inference_mode.*:UserWarning")
def test_opcheck(device: str, operator: Operator) -> None:
    """Schema, registrations, fake tensors and tracing, of what the call dispatches forward and backward."""
    for op, arguments in dispatched(operator, device).items():
        if OPDEFS[op.name()]._backward_fn is None:  # it is called below autograd
            arguments = tree_map_only(Tensor, Tensor.detach, arguments)
        torch.library.opcheck(op, arguments, test_utils=CHECKS)


@pytest.mark.slow
@every
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside Dynamo
def test_compiles_into_one_graph(place: str, operator: Operator) -> None:
    per_unit, shared, function = operator.call(UNITS, place)
    tensors = [*per_unit, *shared]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, tensors), results(function, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_checkpointed(operator: Operator) -> None:
    """Non-reentrant checkpointing lets saved tensors be unpacked a single time."""
    per_unit, shared, function = operator.call(UNITS, "cpu")
    tensors = [*per_unit, *shared]

    def recomputed(*tensors: Tensor) -> Sequence[Tensor]:
        return checkpoint(function, *tensors, use_reentrant=False)

    same_bits(results(recomputed, tensors), results(function, tensors))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_no_zeros_are_made_for_outputs_without_a_gradient(operator: Operator) -> None:
    per_unit, shared, function = operator.call(UNITS, "cpu")
    reached = [y for y in function(*per_unit, *shared) if y.requires_grad]
    arriving = weights(reached)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if reached:
            torch.autograd.backward(reached, arriving)
    assert not [event for event in profile.events() if event.name == "aten::zeros"]
