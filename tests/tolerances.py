"""The three-way rule: a kernel may err as much as plain PyTorch in the same dtype, plus rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_three_way(
    got: Tensor,  # the kernel's result
    truth: Tensor,  # fp64
    eager: Tensor,  # what plain PyTorch makes of the same inputs in the same dtype
    *,
    ulps: float = 2.0,
    name: str = "",
) -> None:
    """max |got − truth| ≤ max |eager − truth| + ulps · eps(got.dtype) · max |truth|.

    Shapes and dtypes have to agree too. `ulps` counts the roundings that the kernel may have and eager not
    (the last store, and one per operand that is recomputed in the storage type); say why where it is raised.
    """
    assert got.shape == truth.shape == eager.shape, (name, got.shape, truth.shape, eager.shape)
    assert got.dtype == eager.dtype, (name, got.dtype, eager.dtype)
    if got.numel() == 0:
        return
    info = torch.finfo(got.dtype)
    rounding = ulps * info.eps * float(truth.abs().max()) + info.smallest_normal
    error = float((got.double() - truth).abs().max())
    allowed = float((eager.double() - truth).abs().max()) + rounding
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"
