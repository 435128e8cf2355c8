"""How the chosen and rejected samples lie in memory, reduced to what a kernel has to walk.

The B chosen and B rejected samples of an operand are two (B, …) views; of a (2B, …) tensor, its halves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mapo_kernels._triton import jit, tl


class Halves(NamedTuple):
    """The chosen and the rejected samples of one operand, (B, …) each, with equal strides."""

    chosen: Tensor
    rejected: Tensor

    @property
    def row(self) -> int:
        return self.chosen.stride(0)


class Target(NamedTuple):
    """What the denoiser should have predicted: stored, or made again from the pair's noise ε."""

    kind: str  # "stored"; or "epsilon": ε, "v": α·ε − σ·x₀, "flow": ε − x₀
    halves: Halves | None  # the stored target, or the clean latents x₀; None for "epsilon"
    keys: Tensor | None = None  # (B,) int64
    alphas: Tensor | None = None  # (B,), for "v"
    sigmas: Tensor | None = None


class Operands(NamedTuple):
    """The tensors of samples that a paired loss reads."""

    prediction: Halves
    target: Target
    mask: Halves | None
    reference: Halves | None  # a reference model's prediction

    @property
    def accumulator(self) -> torch.dtype:
        """Type of sums and results: fp64 if a prediction or a target is, else fp32."""
        halves = (self.prediction, self.target.halves, self.reference)
        wide = any(half is not None and half.chosen.dtype == torch.float64 for half in halves)
        return torch.float64 if wide else torch.float32

    def layout(self, grad: Halves | None = None) -> Layout | None:
        """How to walk prediction, target, mask, and the gradient or else the reference."""
        return merge_layout(
            self.prediction,
            self.target.halves,
            self.mask,
            grad or self.reference,
            logical=self.target.kind != "stored",
        )


class Layout(NamedTuple):
    """A sample's index space, innermost dimension first, and each operand's strides in it."""

    dims: int
    sizes: tuple[int, int, int]  # of the inner three; the outermost is not needed
    strides: list[tuple[int, int, int, int]]
    rows: list[int]  # elements between samples


class Given(NamedTuple):
    """The tensors that the operators take besides the prediction, in their order; they get no gradient.

    A target and a reference are (2B, …) in the first of their two fields, or a half in each.
    """

    target: Tensor | None = None  # stored, or the clean latents
    target_rejected: Tensor | None = None
    keys: Tensor | None = None
    alphas: Tensor | None = None
    sigmas: Tensor | None = None
    mask: Tensor | None = None
    reference: Tensor | None = None  # its prediction
    reference_rejected: Tensor | None = None
    reference_error: Tensor | None = None  # or its errors, (B,)
    reference_error_rejected: Tensor | None = None
    weights: Tensor | None = None
    labels: Tensor | None = None
    baseline: Tensor | None = None

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """What the backward pass needs; the reference has no gradient."""
        return self[:6]

    @property
    def reference_errors(self) -> tuple[Tensor, Tensor] | None:
        if self.reference_error is None or self.reference_error_rejected is None:
            return None
        return self.reference_error, self.reference_error_rejected

    def operands(self, prediction: list[Tensor], target_kind: str) -> Operands:
        """These and the prediction, one tensor or two, as halves."""
        predictions = split_halves(*prediction)
        target = None if self.target is None else split_halves(self.target, self.target_rejected)
        reference = self.reference
        return Operands(
            predictions,
            Target(target_kind, target, self.keys, self.alphas, self.sigmas),
            mask_halves(self.mask, predictions.chosen),
            None if reference is None else split_halves(reference, self.reference_rejected),
        )


def split_halves(first: Tensor, second: Tensor | None = None) -> Halves:
    if second is not None:
        return Halves(first, second)
    pairs = first.shape[0] // 2
    return Halves(first[:pairs], first[pairs:])


def mask_halves(mask: Tensor | None, like: Tensor) -> Halves | None:
    """Broadcast a mask to two (B, …) halves without copying it."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if mask.shape[0] == 2 * like.shape[0]:
        chosen, rejected = split_halves(mask, None)
        return Halves(chosen.expand_as(like), rejected.expand_as(like))
    return Halves(mask.expand_as(like), mask.expand_as(like))


def merge_layout(*operands: Halves | None, logical: bool = False) -> Layout | None:
    """Merge a sample's dimensions as far as all operands allow; None if the kernels cannot walk the result.

    Tensors that are dense in the same order (contiguous, channels_last, …) come out as one dimension of
    stride 1: a flat walk over memory. Up to four dimensions may remain otherwise. Halves that lie in memory
    differently, or more dimensions, are rare and left to the eager path. `logical` keeps the order of the
    shape, last dimension first, for walks whose index means something (the noise's elements).
    """
    present = [half for half in operands if half is not None]
    for half in present:
        differ = half.chosen.stride() != half.rejected.stride()
        if differ and (half.chosen.shape[0] > 1 or half.chosen.stride()[1:] != half.rejected.stride()[1:]):
            return None
    samples = [half.chosen for half in present]
    dims = [
        (size, tuple(sample.stride(dim) for sample in samples))
        for dim, size in reversed(list(enumerate(samples[0].shape)))
        if dim > 0 and size > 1
    ]
    if not logical:
        dims.sort(key=lambda dim: dim[1])
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        if merged and all(s == t * merged[-1][0] for s, t in zip(strides, merged[-1][1], strict=True)):
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, strides))
    if len(merged) > 4:
        return None
    used = max(1, len(merged))
    merged += [(1, (1,) * len(samples))] * (4 - len(merged))
    by_operand = iter(zip(*(strides for _, strides in merged), strict=True))
    return Layout(
        dims=used,
        sizes=(merged[0][0], merged[1][0], merged[2][0]),
        strides=[(0, 0, 0, 0) if half is None else next(by_operand) for half in operands],
        rows=[0 if half is None else half.row for half in operands],
    )


@jit
def offsets(index, n0, n1, n2, s0, s1, s2, s3, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Element offsets of flat indices in a sample of DIMS dimensions, innermost first."""
    if DIMS == 1:
        offset = index.to(tl.int64) * s0
    elif DIMS == 2:
        offset = (index % n0).to(tl.int64) * s0 + (index // n0).to(tl.int64) * s1
    else:
        rest = index // n0
        offset = (index % n0).to(tl.int64) * s0 + (rest % n1).to(tl.int64) * s1
        rest = rest // n1
        if DIMS == 3:
            offset += rest.to(tl.int64) * s2
        else:
            offset += (rest % n2).to(tl.int64) * s2 + (rest // n2).to(tl.int64) * s3
    return offset
