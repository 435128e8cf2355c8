"""What the operators that end in projections have in common except the products: shapes, and autograd.

Such an operator is called with (input, …, tensors, formats, scales), the last three as `pack` gives them, and
returns y (…, ΣN) and t (M, Σr). Its backward operator is called with (grad, input or None, t, tensors,
formats, scales, needed) and returns the gradients that are needed: of the input, then of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mapo_kernels.ops._projections import total_rank, unpack, widths


def empty_outputs(
    x: Tensor, dtype: torch.dtype, tensors: Sequence[Tensor], formats: Sequence[str], scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """y and t of an input (…, any), not filled."""
    projections = unpack(tensors, formats, scales)
    batch = x.shape[:-1]
    rows = math.prod(batch)  # Size.numel() would fix a symbolic size
    y = x.new_empty((*batch, sum(widths(projections))), dtype=dtype)
    return y, x.new_empty((rows, total_rank(projections)), dtype=dtype)


def empty_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """The gradients that are needed, not filled."""
    pairs = zip(inputs, needed, strict=True)
    return [i.new_empty(i.shape) for i, need in pairs if need and i is not None]


def differentiate(
    operator: Any, backward_operator: Any, keeps_input: Callable[[list[Tensor], list[str]], bool]
) -> None:
    """Register the autograd of an operator with one input that trains.

    Args:
        operator: as the module says; autograd saves t and the projections' tensors.
        backward_operator: its gradient.
        keeps_input: whether it needs the input too, by the tensors and formats.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *_, tensors, formats, scales = inputs
        _, t = output
        ctx.save_for_backward(x if keeps_input(tensors, formats) else None, t, *tensors)
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)  # else zeros are made for t
        ctx.formats, ctx.scales = formats, scales

    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        of_x, *settings, of_tensors, _, _ = ctx.needs_input_grad
        needed = [of_x, *of_tensors] if grad is not None else [False] * (1 + len(of_tensors))
        found = iter(())
        if grad is not None:
            x, t, *tensors = ctx.saved_tensors
            found = iter(backward_operator(grad, x, t, tensors, ctx.formats, ctx.scales, needed))
        dx, *rest = [next(found) if need else None for need in needed]
        return dx, *[None] * len(settings), rest, None, None

    operator.register_autograd(backward, setup_context=save)
