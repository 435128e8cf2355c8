"""Optimizer states that live in pinned host memory and visit the device around their update.

The parameters of a step are updated in groups (`fused_step.py`). A group's states are fetched into one of two
static buffers on the device, in turn, updated there and stored back; meanwhile the next group's are fetched
into the other one. Which group is next is known from the step before, because backward completes gradients in
the same order every time; where it does not, what is missing is fetched late, which costs time and nothing
else. The order of copies and updates in both memories is `Transfers`' business.

Outside of an update `optimizer.state` holds the host tensors, so that a checkpoint takes and gives them as
any others. A parameter's states lie in one piece of memory: one copy brings them all. States below 64 KiB
stay on the device, where they cost less than their copies would: 9 MB of a whole SDXL UNet's.

The lifetime of a device view is one update. Optimizers may keep its address (AdamW8bit does, in tables): the
same group finds its states at the same place every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mapo_fast.engine.optim_state import restore_optimizer_state
from mapo_fast.engine.optimizers import Fusable
from mapo_fast.engine.transfers import Ticket, Transfers

GROUP_BYTES = 64_000_000
"""Bytes of gradients, or of states, that are updated together."""

_SMALLEST = 1 << 16
"""Bytes from which a parameter's states are streamed: smaller ones cost less than their copies."""

_ALIGNMENT = 256
"""Bytes that allocators align to."""


class _Home:
    """Where a parameter's states live."""

    def __init__(self, memory: Tensor, like: Mapping[str, Tensor]) -> None:
        self.memory = memory  # host, uint8
        self.tensors = _views(memory, like)
        self._visited: tuple[int, int, Tensor, dict[str, Tensor]] = (-1, -1, memory, {})

    def visit(self, buffers: Sequence[Tensor], which: int, start: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The piece of a device buffer for this memory, and its states there; kept for the next step."""
        if self._visited[:2] != (which, start):
            piece = buffers[which][start : start + self.memory.numel()]
            self._visited = which, start, piece, _views(piece, self.tensors)
        return self._visited[2:]


class StateStreaming:
    """The streamed states of one optimizer, which is just built. Makes all its states.

    Args:
        optimizer: its parameters are on one device.
        transfers: copies for that device.
        group_bytes: most bytes of states in one group; a parameter with more is a group of its own.
    """

    def __init__(self, optimizer: Fusable, transfers: Transfers, *, group_bytes: int = GROUP_BYTES) -> None:
        self.optimizer, self.transfers = optimizer, transfers
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._homes: dict[Tensor, _Home] = {}
        for p in self._parameters:
            optimizer.state[p].update(optimizer.initial_state(p))
            self._move_out(p)
        sizes = [self.nbytes(p) for p in self._parameters]
        self.group_bytes = min(max([group_bytes, *sizes]), sum(sizes))
        """Size of a buffer."""
        self.buffers = [
            torch.empty(self.group_bytes, dtype=torch.uint8, device=transfers.device) for _ in range(2)
        ]
        self._expected: list[list[Tensor]] = []  # the groups of the step before
        self._done: list[list[Tensor]] = []  # and of this one
        self._fetched: dict[int, tuple[list[Tensor], list[Ticket]]] = {}

    def nbytes(self, parameter: Tensor) -> int:
        """Bytes that a parameter's states take in a buffer."""
        home = self._homes.get(parameter)
        return 0 if home is None else home.memory.numel()

    def begin(self) -> None:
        """Start to fetch the first group of a step, which comes a forward and a part of backward later."""
        self._prefetch(0)

    @contextmanager
    def visiting(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Have the states of the step's next group on the device.

        Raises:
            ValueError: the states are larger than a buffer.
        """
        number = len(self._done)
        group = [p for p in parameters if p in self._homes]
        ready, tickets = self._fetched.pop(number, ([], []))
        if len(ready) != len(group) or any(a is not b for a, b in zip(ready, group, strict=True)):
            tickets = self._fetch(number, group)
        for ticket in tickets:
            self.transfers.wait(ticket)
        self._done.append(group)
        self._prefetch(number + 1)
        places = self._places(number, group)
        for p, (_, states) in zip(group, places, strict=True):
            self.optimizer.state[p].update(states)
        yield
        for p, (piece, _) in zip(group, places, strict=True):
            home = self._homes[p]
            self.transfers.store(home.memory, piece)
            self.optimizer.state[p].update(home.tensors)

    def end(self) -> None:
        """End a step: the next one is expected to have the same groups."""
        self._expected, self._done = self._done, []
        self._fetched.clear()

    def restore(self, tensors: Iterable[tuple[str, Tensor]], description: Mapping[str, Any]) -> None:
        """Restore states from a checkpoint into host memory; see `restore_optimizer_state`."""
        self.transfers.synchronize()
        homes = self._homes

        def place(p: Tensor, key: str) -> Tensor | None:
            return homes[p].tensors.get(key) if p in homes else None

        restore_optimizer_state(self.optimizer, tensors, description, place=place)
        for p in self._parameters:
            if not self.optimizer.state[p]:  # it never had a gradient
                self.optimizer.state[p].update(self.optimizer.initial_state(p))
            self._move_out(p)

    def _prefetch(self, number: int) -> None:
        if number < len(self._expected):
            group = self._expected[number]
            self._fetched[number] = group, self._fetch(number, group)

    def _fetch(self, number: int, group: Sequence[Tensor]) -> list[Ticket]:
        return [
            self.transfers.fetch(piece, self._homes[p].memory)
            for p, (piece, _) in zip(group, self._places(number, group), strict=True)
        ]

    def _places(self, number: int, group: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter's piece of the group's buffer, and its states there."""
        total = sum(map(self.nbytes, group))
        if total > self.group_bytes:
            raise ValueError(f"the group's states have {total} bytes, a buffer has {self.group_bytes}")
        places, start = [], 0
        for p in group:
            places.append(self._homes[p].visit(self.buffers, number % 2, start))
            start += self.nbytes(p)
        return places

    def _move_out(self, p: Tensor) -> None:
        """Move a parameter's states into host memory; states that are there already stay."""
        state = self.optimizer.state[p]
        large = {key: value for key, value in sorted(state.items()) if self._streams(key, value)}
        nbytes = sum(map(_padded, large.values()))
        old = self._homes.pop(p, None)
        if nbytes < _SMALLEST:
            return
        if old is not None and all(_shares_memory(t, old.memory) for t in large.values()):
            self._homes[p] = _Home(old.memory, large)
            return
        home = self._homes[p] = _Home(self.transfers.empty_host((nbytes,), torch.uint8), large)
        for key, tensor in large.items():
            home.tensors[key].copy_(tensor)
        state.update(home.tensors)

    def _streams(self, key: str, value: Any) -> bool:
        """Whether this is a state of one parameter's elements: not a count, nor a shared state."""
        return isinstance(value, Tensor) and value.numel() > 1 and key not in self.optimizer.shared_states


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _padded(tensor: Tensor) -> int:
    nbytes = tensor.numel() * tensor.element_size()
    return nbytes + -nbytes % _ALIGNMENT


def _views(memory: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shapes, strides and dtypes of `like`, one after the other in flat uint8 memory."""
    views, start = {}, 0
    for key, tensor in like.items():
        part = memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        views[key] = part.as_strided(tensor.shape, tensor.stride())
        start += _padded(tensor)
    return views
