"""Copies between pinned host memory and the device, concurrent with computation.

PCIe is duplex, so there are two streams: one for copies in (`fetch`), one for copies out (`store`). The rules
that keep them right:

- A copy starts after everything that the compute stream has been given so far. What was computed before a
  `store` is what it stores, and a `fetch` overwrites nothing that is still being read.
- A copy starts after the earlier copies from or to the same memory, whichever way they went. A fetch into a
  buffer that is still being stored waits, and so does a fetch of what is still on its way out.
- The compute stream waits for a copy only where `wait` is called: before it reads what was fetched, before it
  overwrites what was stored. The host waits only in `synchronize`, before it reads or writes host memory.
- A ticket keeps both tensors until it is waited for: device memory that a copy still uses cannot be handed
  to anyone else. `record_stream` would do that too, but frees the memory at an unpredictable moment.

On the CPU a copy is made at once and there is nothing to wait for: the same code runs there.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mapo_fast.util.errors import UserError

_REGISTERED_BYTES = 1 << 20
"""Bytes from which host memory is registered by itself. torch's own pinned allocator rounds up to powers of
two: of 66 MiB it makes 128."""


class Ticket:
    """One copy, to be waited for."""

    def __init__(self, event: torch.cuda.Event | None = None, tensors: tuple[Tensor, ...] = ()) -> None:
        self.event = event
        self.tensors = tensors


class Transfers:
    """Copies in both directions for one device.

    The compute stream is the one that is current when a method is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._in: torch.cuda.Stream | None = None
        self._out: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: weakref.WeakKeyDictionary[torch.UntypedStorage, torch.cuda.Event] = (
            weakref.WeakKeyDictionary()
        )
        """The newest copy from or to each memory; it runs after all earlier ones."""

    def empty_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous host tensor, pinned where the device is a GPU.

        All host tensors of the engine are made here, so that a memory trace can tell them from the device's.

        Raises:
            UserError: the driver pins no more memory.
        """
        if self.device.type != "cuda":
            return torch.empty(tuple(shape), dtype=dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _REGISTERED_BYTES:
            try:
                return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
            except RuntimeError as error:
                raise _cannot_pin(nbytes, error) from error
        return torch.frombuffer(_pinned_pages(nbytes, self.device), dtype=dtype).view(tuple(shape))

    def fetch(self, dst: Tensor, src: Tensor) -> Ticket:
        """Copy `src` on the host to `dst` on the device: same shape and dtype, both contiguous."""
        return self._copy(dst, src, self._in)

    def store(self, dst: Tensor, src: Tensor) -> Ticket:
        """Copy `src` on the device to `dst` on the host: same shape and dtype, both contiguous."""
        return self._copy(dst, src, self._out)

    def wait(self, ticket: Ticket) -> None:
        """Let the compute stream, not the host, wait for a copy. Waiting again does nothing."""
        if ticket.event is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket.event)
        ticket.event, ticket.tensors = None, ()

    def synchronize(self) -> None:
        """Let the host wait for all copies, and for what they wait for."""
        if self._in is not None and self._out is not None:
            self._in.synchronize()
            self._out.synchronize()

    def _copy(self, dst: Tensor, src: Tensor, stream: torch.cuda.Stream | None) -> Ticket:
        with torch.no_grad():
            if stream is None:
                dst.copy_(src)
                return Ticket()
            stream.wait_stream(torch.cuda.current_stream(self.device))
            memories = dst.untyped_storage(), src.untyped_storage()
            for memory in memories:
                if (earlier := self._last.get(memory)) is not None:
                    stream.wait_event(earlier)
            with torch.cuda.stream(stream):
                dst.copy_(src, non_blocking=True)
            event = stream.record_event()
            for memory in memories:
                self._last[memory] = event
            return Ticket(event, (dst, src))


class _PinnedPages(mmap.mmap):
    """Pages of their own, pinned as long as the object lives; make them with `_pinned_pages`."""

    address: int | None = None
    """Set while they are pinned."""
    device: torch.device

    def __del__(self) -> None:
        """Unpin while the pages are there: weak references to an mmap die after them."""
        if self.address is None or sys.is_finalizing():  # CUDA is gone at exit, and so are the pages
            return
        torch.cuda.synchronize(self.device)  # a copy that nobody on the host has waited for may use them
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostUnregister(self.address))


def _cannot_pin(nbytes: int, error: Exception) -> UserError:
    return UserError(
        f"{max(1, nbytes >> 20)} MiB more of system RAM cannot be pinned for offload ({error}): close other "
        "programs, or set offload.optimizer, offload.weights or offload.activations to 'gpu'"
    )


def _pinned_pages(nbytes: int, device: torch.device) -> _PinnedPages:
    """Pages that cannot be swapped.

    Raises:
        UserError: the system or the driver gives no more of them.
    """
    try:
        if sys.platform == "win32":
            pages = _PinnedPages(-1, nbytes)
        else:  # private: shared pages, mmap's default, count as shared memory, which containers limit
            pages = _PinnedPages(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
    except (OSError, RuntimeError) as error:
        raise _cannot_pin(nbytes, error) from error
    pages.address, pages.device = address, device
    return pages
