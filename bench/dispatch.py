"""Count the bytes that PyTorch operations move, without executing them.

A custom operator of this package is entered, so that the PyTorch operations in its body are seen as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_LARGE = 1 << 16
"""Elements from which an operation's result is left unwritten."""


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tree: Any) -> int:
    """Bytes of the tensors in a tree; a broadcast dimension counts once."""
    total = 0
    for x in tensors(tree):
        elements = 1
        for n, stride in zip(x.shape, x.stride(), strict=True):
            elements *= n if stride or not n else 1
        total += elements * x.element_size()
    return total


class Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the PyTorch operations that move data; on large floating-point tensors it does not do them.

    Their results have the right shapes and memory that nobody wrote. Small and integer tensors are computed:
    they may hold addresses, or counters that kernels read. An operation moves its inputs and its outputs
    once; views move nothing, nor do allocations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation, and execute it if it is small."""
        kwargs = kwargs or {}
        own = OPDEFS.get(func._schema.name)
        if own is not None:
            with self:
                return own._init_fn(*args, **kwargs)
        given = tensors((args, kwargs))
        written = list(_written(func, args, kwargs))
        if not given or (not written and _is_view(func)) or func.__name__.startswith("empty_like"):
            return func(*args, **kwargs)
        result = self._result(func, args, kwargs, given, written)
        overwritten = func.__name__.split(".")[0] in ("copy_", "fill_", "zero_", "normal_")
        read = [x for x in given if not (overwritten and any(x is y for y in written))]
        self.bytes += size(read) + (size(written) or size(result))
        self.operations += 1
        return result

    def _result(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], written: list[Tensor]) -> Any:
        large = any(x.numel() >= _LARGE for x in given)
        if not large or not all(x.is_floating_point() for x in given):
            return func(*args, **kwargs)
        if written:
            return written if len(func._schema.returns) > 1 else written[0] if func._schema.returns else None
        device = given[0].device

        def shape(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

        def memory(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": "meta"}
        result = func(*tree_map_only(Tensor, shape, args), **tree_map_only(Tensor, shape, kwargs))
        return tree_map_only(Tensor, memory, result)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Arguments that the operation writes to."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)
