"""Watch kernels in Triton's interpreter: every program, load, store and atomic operation.

`watching(watcher)` calls the watcher from inside the interpreter. Two uses: `bench.traffic` counts bytes, and
`MemoryChecker` finds accesses outside the arguments and races between programs. It also takes a third of the
interpreter's time away, by patching the language once a launch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import language as tl
from triton.runtime import interpreter

_data_ptr = Tensor.data_ptr
_LOWEST, _HIGHEST = 2**40, 2**47
"""Where a process's memory lies on 64-bit Linux."""


class Watcher:
    """Callbacks of the interpreter; override those you need. Addresses are the unmasked ones."""

    def launch(self, kernel: Callable[..., Any], arguments: dict[str, Any], programs: int) -> Sequence[int]:
        """A launch begins; return the programs to run, in order, by their flat number."""
        return range(programs)

    def finished(self) -> Sequence[int] | None:
        """The programs have run; return others to run, or None to end the launch."""
        return None

    def addressed(self, x: Tensor) -> None:
        """A tensor's address is taken, to pass it on in a table."""

    def program(self, number: int) -> None: ...

    def load(self, addresses: np.ndarray, width: int) -> None: ...

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray) -> None: ...

    def atomic(self, addresses: np.ndarray, width: int, acquires: bool, releases: bool) -> None: ...


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Let `watcher` see all launches in this context."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock_call, stock_idx, stock_dim = executor.__call__, builder.set_grid_idx, builder.set_grid_dim
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    stock_restore = executor._restore_args_dev
    stock_patch = interpreter._patch_lang
    grid, order = (1, 1, 1), range(1)
    patched: set[frozenset[str]] = set()

    @functools.cache
    def languages(kernel: Callable[..., Any]) -> frozenset[str]:
        return frozenset(v.__name__ for v in kernel.__globals__.values() if v is tl or v is tl.core)

    def patch_once(kernel: Callable[..., Any]) -> Any:
        """Cache a result, so that calls between jitted functions do not compute it again."""
        if languages(kernel) in patched:
            return interpreter._LangPatchScope()
        patched.add(languages(kernel))
        return stock_patch(kernel)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal grid, order
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        wanted = self.grid(arguments) if callable(self.grid) else self.grid
        grid = (*wanted, *[1] * (3 - len(wanted)))
        programs: Sequence[int] | None = watcher.launch(self.fn, arguments, grid[0] * grid[1] * grid[2])
        while programs is not None:
            order, self.grid = programs, (len(programs),)
            patched.clear()  # the launch before has put the language back
            # The interpreter's own tensor operations are nobody's business; a GPU divides by zero in silence.
            with _disable_current_modes(), np.errstate(all="ignore"):
                stock_call(self, *args, **kwargs)
            programs = watcher.finished()

    def set_grid_dim(self: Any, *_: int) -> None:
        stock_dim(self, *grid)

    def set_grid_idx(self: Any, position: int, *_: int) -> None:
        number = order[position]
        x, rest = divmod(number, grid[1] * grid[2])
        stock_idx(self, x, *divmod(rest, grid[2]))
        watcher.program(number)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watcher.load(pointers.data[mask.data], _width(pointers))
        return stock_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        inside = mask.data
        values = np.broadcast_to(value.data, inside.shape)[inside]
        watcher.store(pointers.data[inside], _width(pointers), values)
        return stock_store(self, pointers, value, mask, *rest)

    def rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        watcher.atomic(pointers.data[mask.data], _width(pointers), *_orders(sem))
        return stock_rmw(self, operation, pointers, value, mask, sem, scope)

    def cas(self: Any, pointers: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
        watcher.atomic(pointers.data, _width(pointers), *_orders(sem))
        return stock_cas(self, pointers, compare, value, sem, scope)

    def restore(self: Any, args: Any, host: Any, *rest: Any) -> None:
        # CPU tensors were never copied, and copying them onto themselves would touch all of their memory.
        if any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args):
            stock_restore(self, args, host, *rest)

    def data_ptr(self: Tensor) -> int:
        watcher.addressed(self)
        return _data_ptr(self)

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (Tensor, "data_ptr", data_ptr),
            (executor, "__call__", call),
            (executor, "_restore_args_dev", restore),
            (interpreter, "_patch_lang", patch_once),
            (builder, "set_grid_dim", set_grid_dim),
            (builder, "set_grid_idx", set_grid_idx),
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            (builder, "create_atomic_rmw", rmw),
            (builder, "create_atomic_cas", cas),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


def _width(pointers: Any) -> int:
    """Bytes of the element that a pointer points to."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _orders(sem: Any) -> tuple[bool, bool]:
    name = sem.name
    return "ACQUIRE" in name, "RELEASE" in name


class MemoryAccessError(AssertionError):
    """A kernel accessed memory outside its arguments, or without the needed synchronisation."""


class MemoryChecker(Watcher):
    """Raises `MemoryAccessError` for an access outside the arguments, and for a race between two programs.

    Bounds are those of the tensors that the kernel was given, not of their storages; and of those whose
    addresses are in an int64 tensor that it was given (a test may put false ones there: then nothing is
    checked, and the launch counted as unchecked).

    A race is two accesses of different programs to one element, at least one of them a write, that nothing
    orders, whatever order the interpreter ran them in. Only atomic operations order programs: one that
    acquires sees all that happened before those that released on the same address (vector clocks). Within a
    program only one thing is checked, that a store does not write two values to one element: barriers between
    the threads of a program are the compiler's business and `tl.debug_barrier`'s.
    """

    LARGEST = 1 << 27
    """Elements of shadow memory: launches on more are checked for bounds only, and counted."""

    _SEVERAL = -1

    def __init__(self) -> None:
        self.launches = self.unchecked = 0
        self.known: dict[int, tuple[int, int]] = {}

    def addressed(self, x: Tensor) -> None:
        start, end = _extent(x)
        self.known[start] = end, x.element_size()

    def launch(self, kernel: Callable[..., Any], arguments: dict[str, Any], programs: int) -> Sequence[int]:
        self.kernel = kernel.__name__
        self.launches += 1
        self.everywhere = False
        spans = sorted(self._spans(arguments))
        merged: list[tuple[int, int, int, str]] = []
        for start, end, width, name in spans:
            if merged and start < merged[-1][1]:
                before = merged[-1]
                merged[-1] = (before[0], max(before[1], end), min(before[2], width), f"{before[3]}, {name}")
            else:
                merged.append((start, end, width, name))
        self.spans = merged
        self.starts = np.array([m[0] for m in merged], dtype=np.int64)
        self.ends = np.array([m[1] for m in merged], dtype=np.int64)
        self.widths = np.array([m[2] for m in merged], dtype=np.int64)
        sizes = -(-(self.ends - self.starts) // self.widths)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        total = int(sizes.sum())
        self.races = programs > 1 and total <= self.LARGEST and not self.everywhere
        self.unchecked += self.everywhere or (programs > 1 and not self.races)
        if self.races:
            # By element; programs are numbered from 1 here, 0 is nobody.
            self.writer, self.reader, self.lane = (np.zeros(total, dtype=np.int32) for _ in range(3))
            self.write_clock, self.read_clock = (np.zeros(total, dtype=np.int32) for _ in range(2))
            self.by_atomic = np.zeros(total, dtype=bool)
            self.released: dict[int, np.ndarray] = {}
            self.programs = programs
        return range(programs)

    def _spans(self, arguments: dict[str, Any]) -> Iterator[tuple[int, int, int, str]]:
        """(start, end, bytes of an element, name) of the memory that the arguments lead to."""
        for name, value in arguments.items():
            for x in value if isinstance(value, tuple) else (value,):
                if not isinstance(x, Tensor) or not x.numel():
                    continue
                yield *_extent(x), x.element_size(), name
                if x.dtype == torch.int64:
                    values = set(x.flatten().tolist())
                    known = values & self.known.keys()
                    for address in known:
                        yield address, *self.known[address], f"a tensor in {name}"
                    # A false address may fall below 0 where true ones are low.
                    if known and any(_LOWEST < v < _HIGHEST or v < 0 for v in values - known):
                        self.everywhere = True

    def program(self, number: int) -> None:
        if self.races:
            self.me = number + 1
            self.seen = np.zeros(self.programs + 1, dtype=np.int32)
            """For each program, how many of its releases happened before an acquire of this program."""
            self.clock = 0

    def load(self, addresses: np.ndarray, width: int) -> None:
        elements = self._elements(addresses, width, "read")
        if elements is None:
            return
        self._after_writes(elements, "reads")
        readers = self.reader[elements]
        alone = (readers == 0) | (readers == self.me)
        self.reader[elements] = np.where(alone, self.me, self._SEVERAL)
        self.read_clock[elements] = self.clock

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        elements = self._elements(addresses, width, "written")
        if elements is None:
            return
        if len(elements) == len(values):
            lanes = np.arange(len(values), dtype=np.int32)
            self.lane[elements] = lanes
            twin = self.lane[elements]
            if (twin != lanes).any() and (values[twin].view(np.uint8) != values.view(np.uint8)).any():
                raise MemoryAccessError(f"{self._where()} stores two values to one element")
        self._after_writes(elements, "writes")
        self._after_reads(elements, "writes")
        self._written(elements, atomic=False)

    def atomic(self, addresses: np.ndarray, width: int, acquires: bool, releases: bool) -> None:
        elements = self._elements(addresses, width, "updated")
        if elements is None:
            return
        self._after_writes(elements[~self.by_atomic[elements]], "updates atomically")
        self._after_reads(elements, "updates atomically")
        for address in set(addresses.ravel().tolist()):
            history = self.released.setdefault(address, np.zeros(self.programs + 1, dtype=np.int32))
            if acquires:
                np.maximum(self.seen, history, out=self.seen)
            if releases:
                np.maximum(history, self.seen, out=history)
                history[self.me] = self.clock + 1
        self._written(elements, atomic=True)
        self.clock += releases

    def _written(self, elements: np.ndarray, atomic: bool) -> None:
        self.writer[elements] = self.me
        self.write_clock[elements] = self.clock
        self.by_atomic[elements] = atomic
        self.reader[elements] = 0

    def _after_writes(self, elements: np.ndarray, does: str) -> None:
        writers = self.writer[elements]
        others = (writers != 0) & (writers != self.me)
        if others.any():
            racing = others & (self.write_clock[elements] >= self.seen[writers])
            if racing.any():
                self._race(elements, racing, writers, does, "wrote")

    def _after_reads(self, elements: np.ndarray, does: str) -> None:
        readers = self.reader[elements]
        others = (readers != 0) & (readers != self.me)
        if others.any():
            racing = others & ((readers == self._SEVERAL) | (self.read_clock[elements] >= self.seen[readers]))
            if racing.any():
                self._race(elements, racing, readers, does, "read")

    def _race(
        self, elements: np.ndarray, racing: np.ndarray, others: np.ndarray, does: str, did: str
    ) -> None:
        first = int(np.argmax(racing))
        span = int(np.searchsorted(self.offsets, elements[first], side="right")) - 1
        other = others[first]
        who = "several programs" if other == self._SEVERAL else f"program {other - 1}"
        raise MemoryAccessError(
            f"race: {self._where()} {does} element {elements[first] - self.offsets[span]} of "
            f"`{self.spans[span][3]}` that {who} {did}, and nothing orders the two"
        )

    def _elements(self, addresses: np.ndarray, width: int, done: str) -> np.ndarray | None:
        """Bounds check; numbers of the elements in shadow memory, or None where races are not looked for."""
        if not addresses.size or self.everywhere:
            return None
        at = addresses.astype(np.int64)
        low, high = int(at.min()), int(at.max()) + width
        span: Any = int(np.searchsorted(self.starts, low, side="right")) - 1
        if span < 0 or high > self.ends[span]:
            span = np.searchsorted(self.starts, at, side="right") - 1
            wrong = (span < 0) | (at + width > self.ends[span])
            if wrong.any():
                raise MemoryAccessError(self._outside(int(at[wrong][0]), width, done))
        if not self.races:
            return None
        elements = self.offsets[span] + (at - self.starts[span]) // self.widths[span]
        widest = width // int(np.min(self.widths[span]))
        if widest > 1:
            elements = (elements[:, None] + np.arange(widest)).ravel()
        return elements

    def _outside(self, address: int, width: int, done: str) -> str:
        start, end, _, name = min(
            self.spans,
            key=lambda s: max(s[0] - address, address + width - s[1]),
            default=(0, 0, 0, "nothing"),
        )
        where = (
            f"{address - end} bytes past the end"
            if address >= end
            else f"{start - address} bytes before the start"
        )
        return f"{self._where()}: {width} bytes {done} outside the arguments, {where} of `{name}`"

    def _where(self) -> str:
        """The kernel, its line, and the program."""
        frame = sys._getframe()
        ours = (__file__, str(Path(interpreter.__file__).parents[1]))
        while frame.f_back and frame.f_code.co_filename.startswith(ours):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        program = f" program {self.me - 1}" if self.races else ""
        return f"{self.kernel} ({place}){program}"


def _extent(x: Tensor) -> tuple[int, int]:
    """First address of a tensor's elements, and the address after the last."""
    start = _data_ptr(x)
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size() if x.numel() else start
