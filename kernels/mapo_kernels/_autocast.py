"""Autocast for custom operators: they see tensors that are cast already, and compute in the types they see.

torch's autocast knows only torch's own operators. So a public function casts the operands of a matrix product
with `cast_operands`, differentiably, and the body of an operator, forward and backward, runs under
`autocast_off`: what it calls must not be cast a second time, wherever `backward()` is called from.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The arithmetic type that autocast asks for on this device, None when it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast_operands(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matrix product in autocast's type; unchanged when autocast is off, or for fp64."""
    device = next(operand.device for operand in operands if operand is not None)
    dtype = autocast_dtype(device)
    if dtype is None:
        return operands
    return tuple(
        o.to(dtype) if o is not None and o.is_floating_point() and o.dtype != torch.float64 else o
        for o in operands
    )


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside an operator's body."""
    return torch.autocast(device.type, enabled=False)
