"""Conversions between tensors that are split among processes (DTensors) and the whole tensors in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather split tensors, in all processes together and one tensor at a time.

    Args:
        keep: whether this process wants the result, in host memory; else it is empty.
    """
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full
    return found


def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be split."""
    with torch.no_grad():
        target.copy_(split(source, target) if isinstance(target, DTensor) else source)


def split(tensor: Tensor, like: DTensor) -> DTensor:
    """Split a tensor that every process has whole: each takes its part."""
    source = tensor.to(like.device)
    return distribute_tensor(source, like.device_mesh, like.placements, src_data_rank=None)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite; of split tensors, in this process's part.

    Allocates one number per tensor, and the host waits once per device.
    """
    largest: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if part.is_floating_point() and part.numel():
            largest.setdefault(part.device, []).append(torch.linalg.vector_norm(part, torch.inf).double())
    return all(bool(torch.isfinite(torch.stack(found)).all()) for found in largest.values())
