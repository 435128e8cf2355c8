"""Everything that a training step does to memory: allocations with their lifetimes, operations between.

The step runs on CPU tensors that are never touched. Memory is only reserved until somebody writes to it, and
here nobody does: an operation on large tensors is not computed, its results get the shapes and strides that
torch's meta kernels say. So a step of the full SDXL takes seconds, and next to no memory. Autograd, autocast,
checkpointing, hooks and addresses are real, as no fake tensor's are.

Custom operators of ours are entered (`card_path`): what they need on the way (normalised activations, partial
sums, cast or dequantised weights) and their matrix products are seen too.

What cannot be seen is what an allocator adds: the CUDA context, library workspaces, fragmentation.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mapo_fast.planner.costs import ELEMENTWISE, Cost, addressed_bytes, cost, hidden_bytes, size, tensors
from mapo_kernels import hardware
from mapo_kernels.ops import adamw8bit

try:
    from triton.runtime.jit import JITFunction
except Exception:  # it is missing, or damaged: see `mapo_kernels._triton`
    JITFunction = None

ROUNDING = 512
"""CUDA's caching allocator rounds every block up to this many bytes."""
_LARGE = 4096
"""Elements from which tensors are not computed. Smaller ones are, because the host may read them."""

META = torch.device("meta")


class Allocation:
    """One storage, in use from operation `born` until before operation `died`."""

    __slots__ = ("born", "died", "nbytes", "number", "tag")

    def __init__(self, nbytes: int, born: int, number: int) -> None:
        self.nbytes = -(-nbytes // ROUNDING) * ROUNDING
        self.number, self.born = number, born
        self.died: int | None = None
        self.tag = ""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager; `live` and `peak` are bytes.

    Args:
        held: tensors that exist already, such as parameters: counted from the start, once per storage.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Cost] = []
        self.allocations: list[Allocation] = []
        self.made: list[Allocation] = []
        """All allocations ever made, by number; `allocations` are those that count."""
        self.events: list[int] = []
        """Numbers of allocations, and ~numbers of frees, in order."""
        self.first = 0
        """The first operation that counts."""
        self.live = self.peak = 0
        self._of: dict[int, Allocation] = {}
        self._known: dict[Any, Any] = {}
        self._launched_with: set[int] = set()
        """Storages that our newest operator has passed to kernels."""
        for tensor in held:
            self.allocation(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Always False: nothing is compiled here, and the default check takes longer than most operations."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute the operation if it is small; record its cost and the storages it returns."""
        kwargs = kwargs or {}
        form = _form(func)
        if form.inside is not None:
            self._launched_with.clear()
            with self:
                out = form.inside(*args, **kwargs)
            written = [x for x in _written(form, args, kwargs) if _memory(x) in self._launched_with]
            if written:  # read and written by one launch
                self.addressed(size(written))
            return out
        if form.view:
            out = func(*args, **kwargs)
            for tensor in tensors(out):  # `x.data = y` and the like: a view that nobody else has shown
                self.allocation(tensor)
            return out
        given = tensors(args) + tensors(kwargs)
        out = self._result(func, form, given, args, kwargs)
        made = tensors(out)
        for tensor in made:
            self.allocation(tensor)
        found = cost(func, args, given, made, out, _written(form, args, kwargs))
        if found is not None:
            if hidden := hidden_bytes(func, args):
                workspace = self._new(hidden)
                self._gone(workspace, len(self.operations) + 1)
            self.operations.append(found)
        return out

    def launched(self, arguments: Sequence[Any]) -> None:
        """Record a Triton kernel, which reads or writes each of its tensors once."""
        given = tensors(arguments)
        self._launched_with.update(map(_memory, given))
        self.operations.append(Cost(ELEMENTWISE, 0.0, float(size(given))))

    def addressed(self, nbytes: int) -> None:
        """Record bytes that the newest launches moved in tensors that are not their arguments."""
        last = self.operations[-1]
        self.operations[-1] = last._replace(nbytes=last.nbytes + nbytes)

    def allocation(self, tensor: Tensor) -> Allocation:
        """The allocation of a tensor, new or known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._of.get(key)
        if known is not None:
            return known
        new = self._of[key] = self._new(storage.nbytes())

        def freed() -> None:
            del self._of[key]
            self._gone(new, len(self.operations))

        weakref.finalize(storage, freed).atexit = False
        return new

    def name(self, tensor: Tensor, tag: str) -> None:
        """Tag a tensor's memory, unless it has a tag."""
        allocation = self.allocation(tensor)
        allocation.tag = allocation.tag or tag

    def tag_saved(self) -> None:
        """Tag everything that the step has made and that is alive now as saved for backward."""
        for allocation in self._of.values():
            if allocation.born > self.first:
                allocation.tag = allocation.tag or "saved"

    def restart(self) -> None:
        """Begin again: allocations alive now count from the start, earlier events do not count."""
        self.first = len(self.operations)
        self.allocations = list(self._of.values())
        for allocation in self.allocations:
            allocation.born = self.first
        self.peak = self.live

    def _new(self, nbytes: int) -> Allocation:
        new = Allocation(nbytes, len(self.operations), len(self.made))
        self.made.append(new)
        self.events.append(new.number)
        self.allocations.append(new)
        self.live += new.nbytes
        self.peak = max(self.peak, self.live)
        return new

    def _gone(self, allocation: Allocation, died: int) -> None:
        self.live -= allocation.nbytes
        allocation.died = died
        self.events.append(~allocation.number)

    def _result(self, func: Any, form: _Form, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """The operation's result, computed only if it is small."""
        small = all(x.numel() < _LARGE for x in given) if given else not form.factory
        if small:
            return func(*args, **kwargs)
        if form.writes:
            written = [kwargs[name] if i >= len(args) else args[i] for i, name in form.writes]
            return None if not form.returns else written[0] if form.returns == 1 else written
        key = (func, _key(args), _key(kwargs))
        shapes = self._known.get(key)
        if shapes is None:
            meta_kwargs = tree_map_only(Tensor, _shape, kwargs)
            if not given or kwargs.get("device") is not None:
                meta_kwargs["device"] = META
            shapes = self._known[key] = func(*tree_map_only(Tensor, _shape, args), **meta_kwargs)
        if not given and all(x.numel() < _LARGE for x in tensors(shapes)):
            return func(*args, **kwargs)
        return _untouched(shapes)


class _Form(NamedTuple):
    """Facts about an operation from its schema and registrations."""

    inside: Callable[..., Any] | None
    """The body of a custom operator, or a decomposition into other operations."""
    view: bool
    writes: list[tuple[int, str]]
    """Place and name of the arguments that it writes to."""
    returns: int
    factory: bool
    """Whether it can make a tensor without tensor arguments."""


@functools.cache
def _form(func: Any) -> _Form:
    schema = func._schema
    inside = None
    own = OPDEFS.get(schema.name)
    if own is not None and own._namespace == "mapo":
        inside = own._init_fn
    elif torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        inside = func.decompose
    writes = [
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    aliases = any(r.alias_info is not None for r in schema.returns)
    factory = any(a.name == "device" for a in schema.arguments)
    return _Form(inside, aliases and not writes, writes, len(schema.returns), factory)


def _written(form: _Form, args: Any, kwargs: Any) -> list[Tensor]:
    """The given tensors that an operation writes to."""
    return tensors([kwargs.get(name) if i >= len(args) else args[i] for i, name in form.writes])


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _key(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, (list, tuple)):
        return tuple(_key(part) for part in tree)
    if isinstance(tree, dict):
        return tuple((name, _key(part)) for name, part in tree.items())
    return type(tree), tree


def _shape(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def _untouched(shapes: Any) -> Any:
    """Unwritten memory for meta tensors; small tensors are filled with 1."""
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(_untouched(part) for part in shapes)
    if not isinstance(shapes, Tensor):
        return shapes
    made = torch.empty_strided(shapes.shape, shapes.stride(), dtype=shapes.dtype, device="cpu")
    return made if made.numel() >= _LARGE else made.fill_(1)


@contextmanager
def card_path(card: hardware.Card | None, recorder: Recorder) -> Iterator[None]:
    """Let our operators take the kernel path of `card` in this context, and report launches to the recorder.

    None means a card on which no kernel runs.
    """
    real_step = adamw8bit.take_step

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorder.launched([*args, *kwargs.values()])

    def step(tensors: Any, settings: Any, plan: Any) -> None:
        real_step(tensors, settings, plan)
        recorder.addressed(addressed_bytes(tensors, settings.max_update_rms is not None))

    if JITFunction is None or card is None:  # without Triton operators run in plain torch, on a card too
        yield
        return
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(adamw8bit, "take_step", step),
        hardware.assume_card(card),
    ):
        yield
