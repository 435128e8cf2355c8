"""Transfers as slow as a GPU may be: a missing wait gives NaN on the CPU too."""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_fast.engine.transfers import Ticket, Transfers


class _Copy(Ticket):
    def __init__(self, dst: Tensor, src: Tensor, inwards: bool) -> None:
        super().__init__(None, (dst, src))
        self.inwards = inwards

    def touches(self, other: _Copy) -> bool:
        memories = [{t.untyped_storage()._cdata for t in copy.tensors} for copy in (self, other)]
        return bool(memories[0] & memories[1])


class DelayedTransfers(Transfers):
    """Each copy is made as late as its rules allow; until then its destination holds NaN.

    Only what waits for a copy makes it happen: `wait`, `synchronize`, a later copy from or to the same memory
    that happens itself, and whatever is after it on the same stream. A source overwritten too early is
    therefore copied as it is then. Plain `Transfers` on the CPU is the other extreme: everything happens at
    once.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cpu"))
        self.pending: list[_Copy] = []
        self.fetched_bytes = 0
        self.stored_bytes = 0
        self.host_bytes = 0

    def empty_host(self, shape, dtype):  # type: ignore[no-untyped-def]
        tensor = super().empty_host(shape, dtype)
        self.host_bytes += tensor.nbytes
        _poison(tensor)
        return tensor

    def fetch(self, dst: Tensor, src: Tensor) -> Ticket:
        self.fetched_bytes += dst.nbytes
        return self._start(dst, src, inwards=True)

    def store(self, dst: Tensor, src: Tensor) -> Ticket:
        self.stored_bytes += dst.nbytes
        return self._start(dst, src, inwards=False)

    def wait(self, ticket: Ticket) -> None:
        if isinstance(ticket, _Copy):
            self._happen(ticket)
        super().wait(ticket)

    def synchronize(self) -> None:
        while self.pending:
            self._happen(self.pending[-1])

    def _start(self, dst: Tensor, src: Tensor, *, inwards: bool) -> Ticket:
        assert dst.shape == src.shape, (dst.shape, src.shape)
        assert dst.dtype == src.dtype
        assert dst.is_contiguous()
        assert src.is_contiguous()
        copy = _Copy(dst, src, inwards)
        for earlier in [c for c in self.pending if c.touches(copy)]:
            self._happen(earlier)  # it must read or write this memory before this copy poisons it
        _poison(dst)
        self.pending.append(copy)
        return copy

    def _happen(self, copy: _Copy) -> None:
        if copy not in self.pending:
            return
        before = self.pending[: self.pending.index(copy)]
        for earlier in [c for c in before if c.inwards == copy.inwards or c.touches(copy)]:
            self._happen(earlier)
        self.pending.remove(copy)
        dst, src = copy.tensors
        with torch.no_grad():
            dst.copy_(src)


def _poison(tensor: Tensor) -> None:
    """Fill with 0xff bytes: NaN in every floating-point type."""
    tensor.detach().view(-1).view(torch.uint8).fill_(255)
