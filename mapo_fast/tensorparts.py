"""Tensors that are split among processes (DTensors), and whole ones: what files hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather what is split, in all processes together and one tensor at a time.

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
    """Each process takes its part of what it has itself."""
    source = tensor.to(like.device)
    return distribute_tensor(source, like.device_mesh, like.placements, src_data_rank=None)
