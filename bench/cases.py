"""What the benches run: one registry of cases, by op, with SDXL's real shapes at 1024².

A case makes its inputs and names who can compute it: this package, PyTorch eager, other libraries.
`bench.resources` compiles the kernels of these cases, `bench.traffic` counts their bytes, `bench.ops`
measures them, `bench.saved_memory` asks what they keep for backward. To add an op, add its cases to `CASES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from mapo_kernels import paired_loss

Provider = Callable[..., Callable[[], Any]]
"""Binds a case's inputs and returns the call to measure; what happens only once is done here."""


@dataclass(frozen=True)
class New:
    """Makes a case's tensors: random ones to measure with, or untouched memory to compile and count with."""

    device: torch.device
    fill: bool = False

    def __call__(
        self,
        *shape: int,
        dtype: torch.dtype,
        grad: bool = False,
        scale: float = 1.0,
        channels_last: bool = False,
    ) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device=self.device, memory_format=layout)
        if self.fill:
            x.normal_(0.0, scale)
        return x.requires_grad_(grad)

    def like(self, outputs: list[Tensor]) -> list[Tensor]:
        """Gradients that arrive at these outputs."""
        return [torch.randn_like(y) if self.fill else torch.empty_like(y) for y in outputs]


@dataclass(frozen=True)
class Case:
    """One op on one shape."""

    op: str
    shape: str
    """As a table shows it: sizes, and options that change what is computed."""
    dtype: torch.dtype
    """The type of the large tensors."""
    inputs: Callable[[New], tuple[Any, ...]]
    providers: Mapping[str, Provider]
    """`ours` and `eager` always; another library's returns None where it is not installed."""
    compiled: Callable[..., Any] | None = None
    """What `torch.compile` is given; usually the eager function."""
    measured: bool = True
    """False: only its kernels are compiled."""
    headline: bool = False
    """Measured first; the README shows these."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    return names[dtype]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def differentiable(tree: Any) -> list[Tensor]:
    return [x for x in tensors(tree) if x.requires_grad]


def size(tree: Any) -> int:
    """Bytes of the tensors in a tree; a broadcast dimension counts once."""
    total = 0
    for x in tensors(tree):
        elements = 1
        for n, stride in zip(x.shape, x.stride(), strict=True):
            elements *= n if stride else 1
        total += elements * x.element_size() if x.numel() else 0
    return total


def _plain(f: Callable[..., Any]) -> Provider:
    """Provider of an op that is a function of its inputs."""
    return functools.partial(functools.partial, f)


# --- paired_loss ---


def _released_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss as the released script writes it, in fp32."""
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    chosen, rejected = errors.chunk(2)
    score_w, score_l = (0.5 * e / (torch.exp(0.5 * e) - 1) for e in (chosen, rejected))
    return (chosen - 0.1 * F.logsigmoid(1000 * (score_w - score_l))).mean()


def _paired_loss(
    shape: tuple[int, ...], dtype: torch.dtype, *, target: torch.dtype | None = None, **options: Any
) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        return new(*shape, dtype=dtype, grad=True), new(*shape, dtype=target or dtype)

    return Case(
        op="paired_loss",
        shape="×".join(map(str, shape)) + (f", {dtype_name(target)} target" if target else ""),
        dtype=dtype,
        inputs=inputs,
        providers={
            "ours": _plain(lambda p, t: paired_loss(p, t).loss),
            "eager": _plain(_released_loss),
        },
        compiled=_released_loss,
        **options,
    )


def _paired_loss_corner(name: str, inputs: Callable[[New], tuple[Any, ...]], **settings: Any) -> Case:
    def ours(p: Tensor, t: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return paired_loss(p, t, mask=mask, weights=weights, **settings).loss

    dtype = inputs(New(torch.device("meta")))[0].dtype
    return Case("paired_loss", name, dtype, inputs, {"ours": _plain(ours)}, measured=False)


def _paired_loss_cases() -> Iterator[Case]:
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    for side in (128, 64, 32):
        for batch in (4, 8, 2):
            headline = (side, batch) == (128, 4)
            yield _paired_loss((batch, 4, side, side), bf16, headline=headline)
    for batch in (64, 1024):
        yield _paired_loss((batch, 4, 128, 128), bf16)
    yield _paired_loss((8, 4, 128, 128), bf16, target=fp32)
    yield _paired_loss((8, 4, 128, 128), fp32)

    yield _paired_loss_corner(
        "strided, channels_last target, bool mask, weights, per pair",
        lambda new: (
            new(6, 5, 9, 14, dtype=fp32)[..., ::2].requires_grad_(),
            new(6, 5, 9, 7, dtype=fp32, channels_last=True),
            torch.empty(3, 1, 9, 7, dtype=torch.bool, device=new.device),
            new(3, dtype=fp32),
        ),
        objective="mapo_paper_power",
        reduction="none",
    )
    yield _paired_loss_corner(
        "four walked dimensions",
        lambda new: (
            new(4, 3, 6, 5, 8, dtype=fp16, grad=True),
            new(4, 6, 3, 8, 5, dtype=fp32).permute(0, 2, 1, 4, 3),
        ),
        objective="mapo_paper_scale",
    )
    yield _paired_loss_corner(
        "one element",
        lambda new: (new(2, 1, dtype=fp32, grad=True), new(2, 1, dtype=fp32)),
        objective="sft",
    )
    yield _paired_loss_corner(
        "fp64 prediction, bf16 target",
        lambda new: (new(4, 4, 16, 16, dtype=fp64, grad=True), new(4, 4, 16, 16, dtype=bf16)),
    )
    yield _paired_loss_corner(
        "2^31 elements a sample",
        lambda new: (
            new(1, dtype=bf16).expand(2, 2**31).requires_grad_(),
            new(1, dtype=bf16).expand(2, 2**31),
        ),
    )


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "paired_loss": _paired_loss_cases,
}


def cases(op: str = "all") -> list[Case]:
    """Cases of one op, or of all of them, in the order in which they are measured."""
    if op != "all" and op not in CASES:
        raise ValueError(f"op: {op!r} is unknown; choose one of all, {', '.join(CASES)}")
    return [case for name, make in CASES.items() if op in ("all", name) for case in make()]
