"""Autocast for custom operators: they are told the type of their product, and cast its operands themselves.

torch's autocast knows only torch's own operators. So a public function asks for `autocast_dtype` and passes
it on, and the operator casts weights inside, in forward and again in backward: a cast copy made outside would
be saved. The body of an operator runs under `autocast_off`: what it calls must not be cast a second time,
wherever `backward()` is called from.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The arithmetic type that autocast asks for on this device, None when it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside an operator's body."""
    return torch.autocast(device.type, enabled=False)
