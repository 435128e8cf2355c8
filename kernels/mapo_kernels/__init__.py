"""Fused Triton kernels for MaPO training; needs torch, uses Triton where it is installed.

Nothing here imports `mapo_fast`. An operator's module holds its kernels, launchers, registration, public
function and fp64 reference; modules with an underscore are shared between operators.
"""

from mapo_kernels._launch import Backend, backend
from mapo_kernels.objectives import OBJECTIVES
from mapo_kernels.paired_loss import (
    PairedLoss,
    paired_loss,
    paired_loss_from_errors,
    paired_loss_reference,
)

__all__ = [
    "OBJECTIVES",
    "Backend",
    "PairedLoss",
    "backend",
    "paired_loss",
    "paired_loss_from_errors",
    "paired_loss_reference",
]
