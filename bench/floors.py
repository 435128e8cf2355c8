"""Least bytes that an operation has to move."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bench.dispatch import size

BLOCK = 256
"""Elements of a state that share a scale of four bytes."""
QUANTISED = 4096
"""Parameters with fewer elements keep fp32 states."""


def adamw8bit(parameters: Sequence[Tensor]) -> int:
    """Least bytes of an AdamW8bit step: parameters and states read and written, gradients read."""
    elements = [p.numel() for p in parameters]
    states = sum(2 * (n + 4 * -(-n // BLOCK)) if n >= QUANTISED else 8 * n for n in elements)
    return 3 * size(parameters) + 2 * states
