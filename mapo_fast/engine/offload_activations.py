"""Inputs of checkpointed blocks that wait for backward in host memory.

Non-reentrant checkpointing keeps a block's inputs as saved tensors, outside its own hooks: the hooks of
`around` see exactly them. On the way forward an input is stored while its block computes, and its device
memory is given up when the next one is stored. On the way back each input that is asked for also starts the
fetch of the one before it, while the block's recomputation and backward run.

What stays on the device: small tensors (the time embedding, a pair's prompt embeddings) and what is saved
twice, for it lives on the device anyway (the prompt embeddings of a large batch are an input of every block).

The k-th input of a pass uses the k-th host buffer, which grows where an image bucket needs more. So nothing
is pinned once every bucket has been seen, and host memory is that of the largest one.
"""

from __future__ import annotations

import heapq
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mapo_fast.engine.transfers import Ticket, Transfers

OFFLOADED_BYTES = 1 << 20
"""Smaller tensors stay on the device."""


class _Saved:
    """One saved tensor: its elements in host memory, and on the device while `flat` is set."""

    def __init__(self, x: Tensor, number: int, host: Tensor, transfers: Transfers) -> None:
        self.shape, self.stride, self.device = x.shape, x.stride(), x.device
        self.number = number
        self.host = host  # (numel,), x's dtype
        flat = x.as_strided((x.numel(),), (1,))
        self.flat: Tensor | None = flat
        self.ticket: Ticket = transfers.store(host, flat)
        """Ticket of the newest copy between host memory and device."""


class ActivationOffload:
    """Stores and fetches the inputs of checkpointed blocks; one object serves all steps.

    Besides the inputs of the block at work, the device holds one on its way out or one on its way in.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._memory: list[Tensor] = []
        """Host buffers, (nbytes,) uint8."""
        self._free: list[int] = []
        """Numbers of the buffers that no saved tensor uses; a heap."""
        self._waiting: weakref.WeakValueDictionary[int, _Saved] = weakref.WeakValueDictionary()
        """Saved tensors that backward has not asked for yet, by number."""
        self._leaving: _Saved | None = None
        """The tensor that was stored last and is still on the device."""
        self._stored: weakref.WeakKeyDictionary[torch.UntypedStorage, set[Any]] = weakref.WeakKeyDictionary()
        """Which parts, by offset and shape, were stored of device memory that is still alive."""

    def around(self) -> AbstractContextManager[Any]:
        """The context of one call of `checkpoint(…, use_reentrant=False)`, and of nothing else."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def reset(self) -> None:
        """End a step: give up what it has left on the device."""
        self._release()

    def _release(self) -> None:
        if self._leaving is not None:
            self.transfers.wait(self._leaving.ticket)
            self._leaving.flat = None
            self._leaving = None

    def _pack(self, x: Tensor) -> Tensor | _Saved:
        if x.nbytes < OFFLOADED_BYTES or x.device.type != self.transfers.device.type or not _dense(x):
            return x
        parts = self._stored.setdefault(x.untyped_storage(), set())
        part = (x.storage_offset(), x.shape)
        if part in parts:
            return x
        parts.add(part)
        self._release()
        number, memory = self._buffer(x.nbytes)
        saved = _Saved(x, number, memory.view(x.dtype), self.transfers)
        # The buffer is free when autograd drops the tensor. Copies that still use it then are ordered before
        # the next ones by `Transfers`.
        weakref.finalize(saved, heapq.heappush, self._free, number).atexit = False
        self._waiting[number] = self._leaving = saved
        return saved

    def _unpack(self, packed: Tensor | _Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._waiting.pop(packed.number, None)
        if packed is self._leaving:
            self._leaving = None
        flat = self._fetch(packed)
        self.transfers.wait(packed.ticket)
        packed.flat = None  # it is the recomputation's now, which lets go of it when it can
        earlier = [number for number in self._waiting.keys() if number < packed.number]  # noqa: SIM118
        if earlier and (following := self._waiting.get(max(earlier))) is not None:
            self._fetch(following)
        return flat.as_strided(packed.shape, packed.stride)

    def _fetch(self, saved: _Saved) -> Tensor:
        """The elements on the device, there once the ticket is waited for."""
        if saved.flat is None:
            saved.flat = torch.empty(saved.host.shape, dtype=saved.host.dtype, device=saved.device)
            saved.ticket = self.transfers.fetch(saved.flat, saved.host)
        return saved.flat

    def _buffer(self, nbytes: int) -> tuple[int, Tensor]:
        """The first free host buffer, cut to size."""
        if not self._free:
            self._free.append(len(self._memory))
            self._memory.append(self.transfers.empty_host((nbytes,), torch.uint8))
        number = heapq.heappop(self._free)
        if self._memory[number].nbytes < nbytes:
            self._memory[number] = self.transfers.empty_host((nbytes,), torch.uint8)
        return number, self._memory[number][:nbytes]


def _dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
