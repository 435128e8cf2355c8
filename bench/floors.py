"""Bytes that an operation cannot do without."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bench.dispatch import size

BLOCK = 256
"""Elements of a state that share a scale of four bytes."""
QUANTISED = 4096
"""Parameters with fewer elements keep fp32 states."""


def adamw8bit(parameters: Sequence[Tensor]) -> int:
    """Of a step of AdamW8bit: parameters and states read and written, gradients (of the same type) read."""
    elements = [p.numel() for p in parameters]
    states = sum(2 * (n + 4 * -(-n // BLOCK)) if n >= QUANTISED else 8 * n for n in elements)
    return 3 * size(parameters) + 2 * states
