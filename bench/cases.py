"""The cases that the benches run: one registry, by op, with SDXL's real shapes at 1024².

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

from bench import floors, peers
from bench.dispatch import size, tensors
from mapo_kernels import Projection
from mapo_kernels.fp8 import to_fp8, to_fp8_eager
from mapo_kernels.objectives import OBJECTIVES
from mapo_kernels.ops.adamw8bit import AdamW8bit
from mapo_kernels.ops.add_rounded import add_rounded_
from mapo_kernels.ops.geglu import geglu
from mapo_kernels.ops.geglu_linear import geglu_linear
from mapo_kernels.ops.group_norm_silu import group_norm_silu
from mapo_kernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mapo_kernels.ops.layer_norm import layer_norm
from mapo_kernels.ops.layer_norm_linear import layer_norm_linear
from mapo_kernels.ops.lora_linear import lora_linear
from mapo_kernels.ops.paired_loss import NoiseTarget, paired_loss
from mapo_kernels.ops.paired_noise import paired_noise

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

Provider = Callable[..., Callable[[], Any]]
"""Binds a case's inputs and returns the call to measure; one-time work is done while binding."""


MEASURED = frozenset({"compile", "count", "measure"})
SWEEP = frozenset({"compile", "measure"})
"""A second, small size of a case, whose traffic is counted."""
CORNER = frozenset({"compile"})
TINY = frozenset({"compile", "try"})
"""Cases small enough for a CPU and the interpreter, but with several programs."""


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

    def parameter(self, *shape: int, dtype: torch.dtype, grad: bool = True) -> torch.nn.Parameter:
        fan_in = torch.Size(shape[1:] or shape).numel()
        return torch.nn.Parameter(self(*shape, dtype=dtype, scale=fan_in**-0.5), requires_grad=grad)

    def like(self, outputs: list[Tensor]) -> list[Tensor]:
        """Gradients that arrive at these outputs."""
        return [torch.randn_like(y) if self.fill else torch.empty_like(y) for y in outputs]


@dataclass(frozen=True, eq=False)
class Case:
    """One op on one shape."""

    op: str
    shape: str
    """The case's name in a table: sizes, and options that change what is computed."""
    dtype: torch.dtype
    """Type of the large tensors."""
    inputs: Callable[[New], tuple[Any, ...]]
    providers: Mapping[str, Provider]
    """`ours` and `eager` always; another library's returns None where it is not installed."""
    compiled: Callable[..., Any] | None = None
    """Function that `torch.compile` gets; usually the eager one."""
    uses: frozenset[str] = MEASURED
    headline: bool = False
    """Measured first; the docs show these."""
    floor: Callable[[Any], dict[str, int]] | None = None
    """Least bytes by pass from the inputs, where `least_bytes` below does not apply."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    return names[dtype]


def differentiable(tree: Any) -> list[Tensor]:
    return [x for x in tensors(tree) if x.requires_grad]


def least_bytes(case: Case, inputs: Any, outputs: Any) -> dict[str, int]:
    """Least bytes by pass: each input read once, each output and each gradient read or written once."""
    if case.floor is not None:
        return case.floor(inputs)
    least = {"forward": size(inputs) + size(outputs)}
    if differentiable(outputs):
        least["backward"] = size(inputs) + size(differentiable(outputs)) + size(differentiable(inputs))
    return least


def _plain(f: Callable[..., Any]) -> Provider:
    """A provider for an op that is a plain function of its inputs."""
    return functools.partial(functools.partial, f)


def _size(batch: int, headline: bool = True) -> dict[str, Any]:
    """Options of one batch size among several: two pairs (four images) are used where one size is enough."""
    return {"headline": headline} if batch == 4 else {"uses": SWEEP}


def _times(*sizes: int) -> str:
    return "×".join(map(str, sizes))


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
        shape=_times(*shape) + (f", {dtype_name(target)} target" if target else ""),
        dtype=dtype,
        inputs=inputs,
        providers={
            "ours": _plain(lambda p, t: paired_loss(p, t).loss),
            "eager": _plain(_released_loss),
        },
        compiled=_released_loss,
        **options,
    )


def _dpo() -> Case:
    """Diffusion-DPO with the reference's prediction, reduced in the same launch."""
    shape = (4, 4, 128, 128)

    def inputs(new: New) -> tuple[Any, ...]:
        return new(*shape, dtype=BF16, grad=True), new(*shape, dtype=BF16), new(*shape, dtype=BF16)

    def ours(prediction: Tensor, target: Tensor, reference: Tensor) -> Tensor:
        return paired_loss(prediction, target, objective="dpo", reference_prediction=reference).loss

    def eager(prediction: Tensor, target: Tensor, reference: Tensor) -> Tensor:
        error, before = (
            F.mse_loss(x.float(), target.float(), reduction="none").flatten(1).mean(1)
            for x in (prediction, reference)
        )
        gain_w, gain_l = (before - error).chunk(2)
        return -F.logsigmoid(0.5 * OBJECTIVES["dpo"].settings["beta"].default * (gain_w - gain_l)).mean()

    return Case(
        op="paired_loss",
        shape=f"{_times(*shape)}, dpo, reference prediction",
        dtype=BF16,
        inputs=inputs,
        providers={"ours": _plain(ours), "eager": _plain(eager)},
        compiled=eager,
        # Backward reads prediction and target and writes the gradient: the reference is not needed again.
        floor=lambda inputs: {"forward": size(inputs), "backward": size(inputs)},
    )


def _from_keys(kind: str, shape: tuple[int, ...], uses: frozenset[str]) -> Case:
    """Making the target again from its noise's keys, compared with storing and reading it."""

    def inputs(new: New) -> tuple[Any, ...]:
        pairs = shape[0] // 2
        keys = torch.arange(pairs, device=new.device)
        level = (None, None) if kind != "v" else (new(pairs, dtype=FP32), new(pairs, dtype=FP32))
        latents = None if kind == "epsilon" else new(*shape, dtype=BF16)
        return new(*shape, dtype=BF16, grad=True), NoiseTarget(keys, kind, latents, *level)

    def ours(prediction: Tensor, target: NoiseTarget) -> Tensor:
        return paired_loss(prediction, target).loss

    def eager(prediction: Tensor, target: NoiseTarget) -> Callable[[], Tensor]:
        return functools.partial(_released_loss, prediction, torch.zeros_like(prediction))

    return Case(
        op="paired_loss",
        shape=f"{_times(*shape)}, {kind} from keys",
        dtype=BF16,
        inputs=inputs,
        providers={"ours": _plain(ours), "eager": eager},
        uses=uses,
    )


def _paired_loss_corner(name: str, inputs: Callable[[New], tuple[Any, ...]], **settings: Any) -> Case:
    def ours(p: Tensor, t: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return paired_loss(p, t, mask=mask, weights=weights, **settings).loss

    dtype = inputs(New(torch.device("meta")))[0].dtype
    return Case("paired_loss", name, dtype, inputs, {"ours": _plain(ours)}, uses=CORNER)


def _paired_loss_cases() -> Iterator[Case]:
    for side in (128, 64, 32):
        for batch in (4, 8, 2):
            yield _paired_loss((batch, 4, side, side), BF16, **_size(batch, headline=side == 128))
    for batch in (64, 1024):
        yield _paired_loss((batch, 4, 128, 128), BF16, uses=SWEEP)
    yield _paired_loss((8, 4, 128, 128), BF16, target=FP32)
    yield _paired_loss((8, 4, 128, 128), FP32)
    yield _dpo()
    yield _from_keys("epsilon", (4, 4, 128, 128), MEASURED)
    yield _from_keys("v", (4, 4, 40, 30), TINY)
    yield _paired_loss((4, 4, 40, 30), BF16, uses=TINY)

    yield _paired_loss_corner(
        "strided, channels_last target, bool mask, weights, per pair",
        lambda new: (
            new(6, 5, 9, 14, dtype=FP32)[..., ::2].requires_grad_(),
            new(6, 5, 9, 7, dtype=FP32, channels_last=True),
            torch.ones(3, 1, 9, 7, dtype=torch.bool, device=new.device),
            new(3, dtype=FP32),
        ),
        objective="mapo_paper_power",
        reduction="none",
    )
    yield _paired_loss_corner(
        "four walked dimensions",
        lambda new: (
            new(4, 3, 6, 5, 8, dtype=FP16, grad=True),
            new(4, 6, 3, 8, 5, dtype=FP32).permute(0, 2, 1, 4, 3),
        ),
        objective="mapo_paper_scale",
    )
    yield _paired_loss_corner(
        "one element",
        lambda new: (new(2, 1, dtype=FP32, grad=True), new(2, 1, dtype=FP32)),
        objective="sft",
    )
    yield _paired_loss_corner(
        "fp64 prediction, bf16 target",
        lambda new: (new(4, 4, 16, 16, dtype=FP64, grad=True), new(4, 4, 16, 16, dtype=BF16)),
    )
    yield _paired_loss_corner(
        "2^31 elements a sample",
        lambda new: (
            new(1, dtype=BF16).expand(2, 2**31).requires_grad_(),
            new(1, dtype=BF16).expand(2, 2**31),
        ),
    )


# --- paired_noise ---


def _paired_noise(pairs: int, side: int, dtype: torch.dtype = BF16, **options: Any) -> Case:
    shape = (pairs, 4, side, side)

    def inputs(new: New) -> tuple[Any, ...]:
        keys = torch.arange(pairs, device=new.device)
        levels = (torch.full((pairs,), 0.6, device=new.device) for _ in range(2))
        return new(*shape, dtype=dtype), new(*shape, dtype=dtype), keys, *levels

    def eager(chosen: Tensor, rejected: Tensor, keys: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
        """Noise from torch's own generator, kept for the target."""
        noise = torch.randn_like(chosen).repeat(2, 1, 1, 1)
        alpha, sigma = (x.to(dtype).repeat(2).view(-1, 1, 1, 1) for x in (alphas, sigmas))
        return alpha * torch.cat([chosen, rejected]) + sigma * noise

    return Case(
        op="paired_noise",
        shape=f"2 of {_times(*shape)}",
        dtype=dtype,
        inputs=inputs,
        providers={"ours": _plain(paired_noise), "eager": _plain(eager)},
        compiled=eager,
        **options,
    )


def _paired_noise_cases() -> Iterator[Case]:
    for side in (128, 64, 32):
        for pairs in (2, 4, 1):
            yield _paired_noise(pairs, side, **_size(2 * pairs, headline=side == 128))
    for dtype in (FP16, FP32):
        yield _paired_noise(4, 128, dtype)
    yield _paired_noise(64, 128, uses=SWEEP)
    yield _paired_noise(2, 30, uses=TINY)
    yield _paired_noise(1, 1, FP64, uses=CORNER)


# --- geglu ---

FEED_FORWARD = ((64, 640), (32, 1280))
"""(Side of the feature map, channels) of SDXL's transformer blocks; the feed-forward has 4 × the channels."""


def _eager_geglu(projected: Tensor) -> Tensor:
    value, gate = projected.chunk(2, -1)
    return value * F.gelu(gate)


def _geglu(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Case:
    return Case(
        op="geglu",
        shape=_times(*shape),
        dtype=dtype,
        inputs=lambda new: (new(*shape, dtype=dtype, grad=True),),
        providers={"ours": _plain(geglu), "eager": _plain(_eager_geglu), "liger": peers.liger_geglu},
        compiled=_eager_geglu,
        **options,
    )


def _geglu_cases() -> Iterator[Case]:
    for side, channels in FEED_FORWARD:
        for batch in (4, 8, 2):
            yield _geglu((batch, side * side, 8 * channels), BF16, **_size(batch))
    yield _geglu((2, 37, 2 * 160), BF16, uses=TINY)
    for dtype in (FP16, FP32, FP64):
        yield _geglu((2, 1024, 10240), dtype, uses=CORNER)
    yield _geglu((3, 5, 2 * 97), BF16, uses=CORNER)
    yield _geglu((1, 2), FP32, uses=CORNER)


def _geglu_linear(batch: int, side: int, channels: int, **options: Any) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        return (
            new(batch, side * side, 8 * channels, dtype=BF16, grad=True),
            new.parameter(channels, 4 * channels, dtype=BF16),
            new.parameter(channels, dtype=BF16),
        )

    def eager(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(_eager_geglu(projected), weight, bias)

    return Case(
        op="geglu_linear",
        shape=f"{_times(batch, side * side, 8 * channels)} → {channels}",
        dtype=BF16,
        inputs=inputs,
        providers={
            "ours": _plain(lambda x, weight, bias: geglu_linear(x, Projection(weight, bias))),
            "eager": _plain(eager),
        },
        compiled=eager,
        **options,
    )


def _geglu_linear_cases() -> Iterator[Case]:
    for side, channels in FEED_FORWARD:
        for batch in (4, 8, 2):
            yield _geglu_linear(batch, side, channels, **_size(batch))
    yield _geglu_linear(2, 5, 48, uses=TINY)


# --- layer_norm ---


def _eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _layer_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    parameters: torch.dtype | None = None,
    frozen: bool = False,
    **options: Any,
) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        trained = [new.parameter(shape[-1], dtype=parameters or dtype, grad=not frozen) for _ in range(2)]
        return new(*shape, dtype=dtype, grad=True), *trained

    notes = [f"{dtype_name(parameters)} parameters"] if parameters else []
    notes += ["frozen"] if frozen else []
    return Case(
        op="layer_norm",
        shape=", ".join([_times(*shape), *notes]),
        dtype=dtype,
        inputs=inputs,
        providers={
            "ours": _plain(layer_norm),
            "eager": _plain(_eager_layer_norm),
            "liger": peers.liger_layer_norm,
        },
        compiled=_eager_layer_norm,
        **options,
    )


def _add_layer_norm(batch: int, side: int, channels: int, **options: Any) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        x, residual = (new(batch, side * side, channels, dtype=BF16, grad=True) for _ in range(2))
        return x, residual, new.parameter(channels, dtype=BF16), new.parameter(channels, dtype=BF16)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        added = x + residual
        return _eager_layer_norm(added, weight, bias), added

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return layer_norm(x, weight, bias, residual=residual)

    def floor(inputs: tuple[Tensor, ...]) -> dict[str, int]:
        """Backward reads the sum and both gradients and writes one, that of x and of the residual."""
        x, _, *parameters = inputs
        return {"forward": 4 * size(x) + size(parameters), "backward": 4 * size(x) + 2 * size(parameters)}

    return Case(
        op="layer_norm",
        shape=f"{_times(batch, side * side, channels)} + residual",
        dtype=BF16,
        inputs=inputs,
        providers={"ours": _plain(ours), "eager": _plain(eager)},
        compiled=eager,
        floor=floor,
        **options,
    )


def _layer_norm_cases() -> Iterator[Case]:
    for side, channels in FEED_FORWARD:
        for batch in (4, 8, 2):
            yield _layer_norm((batch, side * side, channels), BF16, **_size(batch))
        yield _layer_norm((4, side * side, channels), BF16, frozen=True)
        yield _add_layer_norm(4, side, channels)
    yield _layer_norm((4, 4096, 640), BF16, parameters=FP32)
    yield _layer_norm((2, 50, 80), BF16, parameters=FP32, uses=TINY)
    yield _add_layer_norm(2, 5, 80, uses=TINY)
    for dtype in (FP16, FP32, FP64):
        yield _layer_norm((2, 1024, 1280), dtype, uses=CORNER)
    yield _layer_norm((3, 7, 97), BF16, uses=CORNER)
    yield _layer_norm((5, 1), FP32, uses=CORNER)
    yield _layer_norm((64, 2048), BF16, uses=CORNER)


def _layer_norm_linear(batch: int, side: int, channels: int, widths: list[int], **options: Any) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        x = new(batch, side * side, channels, dtype=BF16, grad=True)
        norm = [new.parameter(channels, dtype=BF16) for _ in range(2)]
        return x, *norm, *(new.parameter(width, channels, dtype=BF16) for width in widths)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        normal = _eager_layer_norm(x, weight, bias)
        return tuple(F.linear(normal, matrix) for matrix in matrices)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        return layer_norm_linear(x, weight, bias, [Projection(matrix) for matrix in matrices])

    return Case(
        op="layer_norm_linear",
        shape=f"{_times(batch, side * side, channels)} → {' + '.join(map(str, widths))}",
        dtype=BF16,
        inputs=inputs,
        providers={"ours": _plain(ours), "eager": _plain(eager)},
        compiled=eager,
        **options,
    )


def _layer_norm_linear_cases() -> Iterator[Case]:
    for side, channels in FEED_FORWARD:
        for batch in (4, 8, 2):
            yield _layer_norm_linear(batch, side, channels, [channels] * 3, **_size(batch))
        yield _layer_norm_linear(4, side, channels, [8 * channels])
    yield _layer_norm_linear(2, 5, 48, [48] * 3, uses=TINY)


# --- lora_linear ---


def _lora_linear(batch: int, side: int, channels: int, *, factors: torch.dtype, **options: Any) -> Case:
    rank = 16

    def inputs(new: New) -> tuple[Any, ...]:
        return (
            new(batch, side * side, channels, dtype=BF16, grad=True),
            new.parameter(channels, channels, dtype=BF16, grad=False),
            new.parameter(channels, dtype=BF16, grad=False),
            new.parameter(rank, channels, dtype=factors),
            new.parameter(channels, rank, dtype=factors),
        )

    def eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The layer in peft's operations."""
        return F.linear(x, weight, bias) + F.linear(F.linear(x.to(a.dtype), a), b).to(x.dtype)

    return Case(
        op="lora_linear",
        shape=f"{_times(batch, side * side, channels)}, rank {rank}, {dtype_name(factors)} factors",
        dtype=BF16,
        inputs=inputs,
        providers={
            "ours": _plain(lambda *inputs: lora_linear(*inputs, scale=1.0)),
            "eager": _plain(eager),
            "peft": peers.peft_lora,
        },
        compiled=eager,
        **options,
    )


def _lora_linear_cases() -> Iterator[Case]:
    for side, channels in FEED_FORWARD:
        for batch in (4, 8, 2):
            yield _lora_linear(batch, side, channels, factors=FP32, **_size(batch))
        yield _lora_linear(4, side, channels, factors=BF16)
    yield _lora_linear(2, 5, 48, factors=FP32, uses=TINY)


# --- fp8 ---


def _fp8(rows: int, columns: int, *, scaled: bool = False, dtype: torch.dtype = BF16, **options: Any) -> Case:
    """Rounding to fp8 by rows: an input, or with `scaled` a gradient times the weight's scales."""

    def inputs(new: New) -> tuple[Tensor, ...]:
        x = new(rows, columns, dtype=dtype)
        return (x, torch.ones(columns, device=new.device)) if scaled else (x,)

    return Case(
        op="fp8",
        shape=_times(rows, columns) + (" × scales" if scaled else ""),
        dtype=dtype,
        inputs=inputs,
        providers={"ours": _plain(to_fp8), "eager": _plain(to_fp8_eager)},
        compiled=to_fp8_eager,
        **options,
    )


def _fp8_cases() -> Iterator[Case]:
    for side, channels in FEED_FORWARD:
        yield _fp8(4 * side * side, channels, headline=True)
        yield _fp8(4 * side * side, 8 * channels, scaled=True)
        for columns in (channels, 3 * channels, 4 * channels):
            yield _fp8(4 * side * side, columns, scaled=True, uses=SWEEP)
        yield _fp8(4 * side * side, 4 * channels, uses=SWEEP)
    yield _fp8(4 * 77, 2048, uses=SWEEP)
    yield _fp8(150, 48, uses=TINY)
    yield _fp8(150, 80, scaled=True, uses=TINY)
    for dtype in (FP16, FP32):
        yield _fp8(640, 1280, dtype=dtype, uses=CORNER)
    yield _fp8(5, 97, uses=CORNER)


# --- group_norm_silu ---

RESNETS = ((128, 320), (64, 640), (32, 1280))
"""(Side of the feature map, channels) of SDXL's resnet blocks; the up blocks also have more channels."""


def _eager_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def _group_norm_silu(
    batch: int,
    side: int,
    channels: int,
    dtype: torch.dtype = BF16,
    *,
    channels_last: bool = False,
    frozen: bool = False,
    parameters: torch.dtype | None = None,
    **options: Any,
) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        x = new(batch, channels, side, side, dtype=dtype, grad=True, channels_last=channels_last)
        trained = [new.parameter(channels, dtype=parameters or dtype, grad=not frozen) for _ in range(2)]
        return x, *trained

    notes = ["channels_last"] if channels_last else []
    notes += [f"{dtype_name(parameters)} parameters"] if parameters else []
    notes += ["frozen"] if frozen else []
    return Case(
        op="group_norm_silu",
        shape=", ".join([_times(batch, channels, side, side), *notes]),
        dtype=dtype,
        inputs=inputs,
        providers={
            "ours": _plain(lambda x, weight, bias: group_norm_silu(x, 32, weight, bias)),
            "eager": _plain(_eager_group_norm_silu),
            "liger": peers.liger_group_norm_silu,
        },
        compiled=_eager_group_norm_silu,
        **options,
    )


def _group_norm_silu_cases() -> Iterator[Case]:
    for side, channels in RESNETS:
        for batch in (4, 8, 2):
            yield _group_norm_silu(batch, side, channels, **_size(batch))
        yield _group_norm_silu(4, side, channels, channels_last=True, headline=side == 128)
    yield _group_norm_silu(4, 128, 320, frozen=True)
    for side, channels in ((128, 960), (64, 1920), (32, 2560)):  # after a skip connection
        yield _group_norm_silu(4, side, channels)
    for side, channels in ((128, 640), (64, 960), (64, 320), (32, 640), (32, 1920)):
        yield _group_norm_silu(4, side, channels, uses=CORNER)
        yield _group_norm_silu(4, side, channels, channels_last=True, uses=CORNER)
    for dtype in (FP16, FP32, FP64):
        for channels_last in (False, True):
            yield _group_norm_silu(2, 32, 1280, dtype, channels_last=channels_last, uses=CORNER)
    yield _group_norm_silu(2, 64, 640, parameters=FP32, uses=CORNER)
    for channels_last in (False, True):
        yield _group_norm_silu(2, 15, 96, channels_last=channels_last, uses=TINY)


def _group_norm_silu_conv(batch: int, side: int, channels: int, **options: Any) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        return (
            new(batch, channels, side, side, dtype=BF16, grad=True),
            *(new.parameter(channels, dtype=BF16) for _ in range(2)),
            new.parameter(channels, channels, 3, 3, dtype=BF16),
            new.parameter(channels, dtype=BF16),
        )

    def eager(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, kernel_bias: Tensor) -> Tensor:
        return F.conv2d(_eager_group_norm_silu(x, weight, bias), kernel, kernel_bias, padding=1)

    return Case(
        op="group_norm_silu_conv",
        shape=f"{_times(batch, channels, side, side)}, 3×3",
        dtype=BF16,
        inputs=inputs,
        providers={
            "ours": _plain(lambda x, *rest: group_norm_silu_conv(x, 32, *rest)),
            "eager": _plain(eager),
        },
        compiled=eager,
        **options,
    )


def _group_norm_silu_conv_cases() -> Iterator[Case]:
    for side, channels in RESNETS:
        for batch in (4, 8, 2):
            yield _group_norm_silu_conv(batch, side, channels, **_size(batch))
    yield _group_norm_silu_conv(2, 9, 32, uses=TINY)


# --- adamw8bit ---


def _transformer_block(channels: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of one SDXL transformer block."""
    square, context, narrow = (channels, channels), (channels, 2048), (channels,)
    attention = [square, square, square, square, narrow, square, context, context, square, narrow]
    feed_forward = [(8 * channels, channels), (8 * channels,), (channels, 4 * channels), narrow]
    return [narrow] * 6 + attention + feed_forward


def _unet() -> list[tuple[int, ...]]:
    """Shapes of all parameters of SDXL's UNet."""
    from diffusers import UNet2DConditionModel

    from mapo_fast.models.full_size import SDXL_UNET

    with torch.device("meta"):
        return [tuple(p.shape) for p in UNet2DConditionModel(**SDXL_UNET).parameters()]


def _adamw8bit(
    name: str,
    shapes: Callable[[], list[tuple[int, ...]]],
    dtype: torch.dtype = BF16,
    *,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Case:
    def inputs(new: New) -> tuple[Any, ...]:
        parameters = [new.parameter(*shape, dtype=dtype) for shape in shapes()]
        for p in parameters:
            (p.grad,) = new.like([p])
        return (parameters,)

    def ours(parameters: list[Tensor]) -> Callable[[], Any]:
        return peers.stepping(AdamW8bit(parameters, **(settings or {})))

    return Case(
        op="adamw8bit",
        shape=name,
        dtype=dtype,
        inputs=inputs,
        providers={
            "ours": ours,
            "eager": peers.torch_adamw,
            "bitsandbytes": peers.bitsandbytes_adamw8bit,
            "torchao": peers.torchao_adamw8bit,
        },
        floor=lambda inputs: {"step": floors.adamw8bit(inputs[0])},
        **options,
    )


def _adamw8bit_cases() -> Iterator[Case]:
    def block() -> list[tuple[int, ...]]:
        return _transformer_block(1280)

    yield _adamw8bit("a transformer block, 1280 channels", block, headline=True)
    yield _adamw8bit("SDXL's UNet", _unet, headline=True, uses=frozenset({"measure"}))
    yield _adamw8bit("a transformer block, 640 channels", lambda: _transformer_block(640))
    yield _adamw8bit("a transformer block, 1280 channels", block, FP32)
    yield _adamw8bit("three tensors of odd sizes", lambda: [(97, 101), (5003,), (3,)], uses=TINY)
    yield _adamw8bit("three tensors of odd sizes", lambda: [(97, 101), (5003,), (3,)], FP16, uses=CORNER)
    yield _adamw8bit(
        "clipped, to nearest",
        lambda: [(64, 64), (3,)],
        settings={"max_update_rms": 1.0, "stochastic_rounding": False},
        uses=CORNER,
    )


# --- add_rounded ---


def _added(total: Tensor, summand: Tensor) -> Callable[[], Any]:
    return lambda: add_rounded_(total, summand, seed=0, tensor_id=7, number=3)


def _add_rounded(shape: tuple[int, ...], summand: torch.dtype = BF16, **options: Any) -> Case:
    return Case(
        op="add_rounded",
        shape=_times(*shape) + ("" if summand == BF16 else f" += {dtype_name(summand)}"),
        dtype=BF16,
        inputs=lambda new: (new(*shape, dtype=BF16), new(*shape, dtype=summand)),
        providers={"ours": _added, "eager": lambda total, summand: lambda: total.add_(summand)},
        floor=lambda inputs: {"forward": size(inputs) + size(inputs[0])},
        **options,
    )


def _add_rounded_cases() -> Iterator[Case]:
    yield _add_rounded((10240, 1280), headline=True)
    yield _add_rounded((1280,))
    yield _add_rounded((97, 101), uses=TINY)
    yield _add_rounded((97, 101), FP32, uses=CORNER)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "paired_loss": _paired_loss_cases,
    "paired_noise": _paired_noise_cases,
    "geglu": _geglu_cases,
    "geglu_linear": _geglu_linear_cases,
    "layer_norm": _layer_norm_cases,
    "layer_norm_linear": _layer_norm_linear_cases,
    "lora_linear": _lora_linear_cases,
    "fp8": _fp8_cases,
    "group_norm_silu": _group_norm_silu_cases,
    "group_norm_silu_conv": _group_norm_silu_conv_cases,
    "adamw8bit": _adamw8bit_cases,
    "add_rounded": _add_rounded_cases,
}


def cases(op: str = "all", use: str | None = None) -> list[Case]:
    """Cases of one op, or of all; only those with a use, or all."""
    if op != "all" and op not in CASES:
        raise ValueError(f"op: {op!r} is unknown; choose one of all, {', '.join(CASES)}")
    found = (case for name, make in CASES.items() if op in ("all", name) for case in make())
    return [case for case in found if use is None or use in case.uses]
