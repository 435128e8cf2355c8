"""Sums of bf16 gradients over micro-batches, rounded stochastically.

Autograd adds to `.grad` in the parameter's type, to nearest: in bf16 a sum of hundreds of micro-batches loses
summands that are small next to it (`add_rounded.py` has the numbers). Here a hook adds as soon as a
parameter's new gradient is complete, which autograd would do at the same place: no more memory is needed, and
no more read.

The random bits are a function of (seed, step, addition within it, parameter, element), so that a run that
goes on from a checkpoint adds the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mapo_kernels import add_rounded_

MOST_ADDITIONS = 1 << 24
"""In a step."""


def kept_to_nearest(count: int) -> float:
    """The share of a bf16 sum of this many noisy terms (deviation = mean) that rounding to nearest keeps."""
    generator = torch.Generator().manual_seed(0)
    total, exact = torch.zeros(256, dtype=torch.bfloat16), torch.zeros(256)
    for _ in range(count):
        term = (1 + torch.randn(256, generator=generator)).bfloat16()
        total += term
        exact += term
    return float(total.float().mean() / exact.mean())


class GradientSums:
    """Adds gradients with stochastic rounding; between backward passes `.grad` is the sum so far, as always.

    Args:
        parameters: bf16 leaves that autograd accumulates into.
        seed: of the random bits.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], seed: int) -> None:
        self.parameters, self.seed = list(parameters), seed
        self._ids = {p: i for i, p in enumerate(self.parameters)}
        self._before: dict[torch.nn.Parameter, Tensor] = {}
        self._number = 0
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(self._completed)  # type: ignore[no-untyped-call]

    def start(self, step: int) -> None:
        """Begin an optimizer step: it draws bits of its own."""
        self._number = step * MOST_ADDITIONS

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Add the gradients of the one backward pass in this context to those of the passes before."""
        self._number += 1
        self._before = {p: p.grad for p in self.parameters if p.grad is not None}
        for p in self._before:
            p.grad = None
        try:
            yield
        finally:
            for p, total in self._before.items():  # this pass had none for it
                p.grad = total
            self._before = {}

    def add(self, totals: Sequence[Tensor], summands: Sequence[Tensor]) -> None:
        """Add each summand to its total, in place."""
        self._number += 1
        for i, (total, summand) in enumerate(zip(totals, summands, strict=True)):
            self._add(total, summand, i)

    def _completed(self, parameter: torch.nn.Parameter) -> None:
        total = self._before.pop(parameter, None)
        if total is not None and parameter.grad is not None:
            self._add(total, parameter.grad, self._ids[parameter])
            parameter.grad = total

    @torch.no_grad()
    def _add(self, total: Tensor, summand: Tensor, number: int) -> None:
        add_rounded_(total, summand, seed=self.seed, tensor_id=number, number=self._number)
