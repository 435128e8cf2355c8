"""Live bytes during a computation, counted by storage at every dispatched operation.

Works on real CPU tensors and on fake ones, so the memory of a training step of the full SDXL can be traced
on a machine that could not run it. What it cannot see is what an allocator adds: the CUDA context, library
workspaces, fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATION = 512
"""CUDA's caching allocator rounds every block up to this many bytes."""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager; `live` and `peak` are bytes, starting with those of `held`.

    Args:
        held: tensors that exist already, such as parameters: counted from the start, once per storage.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: set[int] = set()
        for tensor in held:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)
