"""How many bytes a call keeps for its backward pass, eagerly and under torch.compile's partitioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(function: Callable[[], Any], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that the call saves for backward; those of `besides` do not count."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # kept alive: else storages are freed and their addresses used again
    for tensor in besides:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in one graph, cut by the partitioner that decides what Inductor saves and recomputes."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
