"""Measures a card's rates: once for a GPU, its driver and torch, in a few seconds; later read from disk.

Arithmetic is measured on what SDXL computes most for one pair at 1024², forward and backward, tensors in the
order in which the engine keeps them; of several shapes each has the same share of the work. Products in fp8
are of rounded operands: rounding them has its own operations in a trace. Copies go through the engine's own
pinned memory. The host's time for an operation is that of a transformer block with the trainer's own
operators, on so little data that the device waits for the host; its operations are counted as a trace counts
them.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from mapo_fast.engine.transfers import Transfers
from mapo_fast.hardware.cards import Rates
from mapo_fast.hardware.driver import driver
from mapo_fast.models.patch import FusedTransformerBlock, patch_unet
from mapo_fast.planner import store
from mapo_fast.planner.recorder import Recorder, card_path
from mapo_fast.planner.trace import CARD, CPU
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import read_json, write_json
from mapo_kernels import backend
from mapo_kernels.fp8 import fp8_product, in_fp8, to_fp8

SAMPLES = 5
"""Least number of measurements for a median; more are made until `SECONDS` are over."""
SECONDS = 0.1
MIB = 2**20
COPIED = 96 * MIB
"""Bytes read by a copy on the device: more than its L2 cache holds."""
MOVED = 32 * MIB
"""Bytes of a copy between host and device."""
LAUNCHES = 200
BUSY = 5e-3
"""Seconds in which the host can issue this many operations."""

LINEAR = ((2048, 1280, 10240), (2048, 5120, 1280), (2048, 1280, 1280), (8192, 640, 640))
"""Rows, width in, width out."""
CONVOLUTIONS = ((320, 128), (640, 64), (1280, 32))
"""Channels in and out, side; 3 × 3, two images."""
ATTENTIONS = ((10, 4096), (20, 1024))
"""Heads of 64 numbers, tokens; two images."""

_SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [64, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 1,
    "cross_attention_dim": 64,
    "use_linear_projection": True,
}


def rates_of(device: torch.device) -> Rates:
    """The rates of this GPU: from disk, or measured now.

    Raises:
        RuntimeError: the rates cannot be measured, for instance because too little memory is free.
    """
    path = _path(device)
    with suppress(UserError, TypeError):  # missing or damaged: measured again
        known = Rates(**read_json(path))
        if isinstance(known.source, str) and not _wrong(known._asdict()):
            return known
    rates = measure(device)
    with suppress(OSError, UserError):  # it is a cache
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rates._asdict())
    return rates


def measure(device: torch.device, *, shrink: int = 1) -> Rates:
    """Measure the rates now. Allocates less than 300 MiB at a time, and frees it.

    Args:
        shrink: divides widths and tokens, to try it out where nothing is fast.

    Raises:
        RuntimeError: out of memory, or a figure is not a valid rate.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        found = _measured(device, shrink)
    if on_gpu:
        torch.cuda.empty_cache()
    if wrong := _wrong(found):
        raise RuntimeError(f"measured no {' and '.join(wrong)}")
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    return Rates(**found, source=f"measured on {name}")


def _wrong(figures: Mapping[str, Any]) -> list[str]:
    """Names of the figures that are not valid rates."""
    rates = {name: value for name, value in figures.items() if name != "source"}
    return [n for n, v in rates.items() if not (isinstance(v, float) and math.isfinite(v) and v > 0)]


def _measured(device: torch.device, shrink: int) -> dict[str, float]:
    clock = _Clock(device)
    matrix = _mean([_linear(clock, *(n // shrink for n in shape)) for shape in LINEAR])
    return {
        "matrix": matrix,
        "fp8": _mean([_fp8(clock, *(n // shrink for n in shape)) for shape in LINEAR])
        if in_fp8(device)
        else matrix,
        "convolution": _mean([_convolution(clock, *(n // shrink for n in shape)) for shape in CONVOLUTIONS]),
        "attention": _mean([_attention(clock, heads, tokens // shrink) for heads, tokens in ATTENTIONS]),
        "memory": _memory(clock, COPIED // shrink),
        "fetch": _copy(clock, MOVED // shrink, fetch=True),
        "store": _copy(clock, MOVED // shrink, fetch=False),
        "launch": _launch(clock, 4096 // shrink, matrix),
        "host": _host(clock),
    }


class _Clock:
    """Times calls on a device, and draws tensors there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        """The median time of a call on the device, without that of what is issued `before` it."""
        for _ in range(3):  # chooses algorithms, makes workspaces, raises the clocks
            before()
            call()
        samples: list[float] = []
        began = time.perf_counter()
        while len(samples) < SAMPLES or time.perf_counter() - began < SECONDS:
            samples.append(self._once(call, before))
        return statistics.median(samples)

    def _once(self, call: Callable[[], Any], before: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            before()
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        with torch.cuda.device(self.device):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            before()
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def draw(self, *shape: int) -> Tensor:
        """A tensor that requires a gradient, of the type that the device computes in."""
        return torch.randn(shape, device=self.device, dtype=_dtype(self.device)).requires_grad_()


def _dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _mean(rates: list[float]) -> float:
    """The rate of work that is divided equally among these rates: the harmonic mean."""
    return statistics.harmonic_mean(rates)


def _linear(clock: _Clock, rows: int, width: int, out: int) -> float:
    x, weight, grad = clock.draw(rows, width), clock.draw(out, width), clock.draw(rows, out).detach()

    def call() -> Any:
        return torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    return 3 * 2.0 * rows * width * out / clock.seconds(call)


def _fp8(clock: _Clock, rows: int, width: int, out: int) -> float:
    n, weight = (to_fp8(clock.draw(length, width).detach()) for length in (rows, out))
    return 2.0 * rows * width * out / clock.seconds(lambda: fp8_product(n, weight, None, torch.bfloat16))


def _convolution(clock: _Clock, channels: int, side: int) -> float:
    x, weight = clock.draw(2, channels, side, side), clock.draw(channels, channels, 3, 3)
    grad = torch.randn_like(x)

    def call() -> Any:
        return torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), grad)

    return 3 * 2.0 * x.numel() * 9 * channels / clock.seconds(call)


def _attention(clock: _Clock, heads: int, tokens: int) -> float:
    """Two products in forward, five in backward, as `costs.py` counts them."""
    q, k, v = (clock.draw(2, heads, tokens, 64) for _ in range(3))
    grad = torch.randn_like(q)

    def call() -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

    return 7 * 2.0 * q.numel() * tokens / clock.seconds(call)


def _memory(clock: _Clock, nbytes: int) -> float:
    source = torch.zeros(nbytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.seconds(lambda: target.copy_(source))


def _copy(clock: _Clock, nbytes: int, *, fetch: bool) -> float:
    host = Transfers(clock.device).empty_host((nbytes,), torch.uint8)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=clock.device)
    target, source = (there, host) if fetch else (host, there)
    return nbytes / clock.seconds(lambda: target.copy_(source, non_blocking=True))


def _launch(clock: _Clock, side: int, rate: float) -> float:
    """Seconds per small kernel, of many in a row that are issued while the device is busy with products."""
    x, busy = torch.zeros(1, device=clock.device), clock.draw(side, side).detach()
    products = math.ceil(BUSY * rate / (2 * side**3))

    def before() -> None:
        for _ in range(products):
            busy @ busy

    def call() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    return clock.seconds(call, before) / LAUNCHES


def _host(clock: _Clock) -> float:
    """Wall time of a small block's forward and backward pass, for each operation that a trace has of it."""
    block, pair = _block(clock.device)
    for _ in range(3):  # compiles
        _differentiate(block, pair)
    samples: list[float] = []
    for _ in range(10 * SAMPLES):
        clock.finish()
        began = time.perf_counter()
        _differentiate(block, pair)
        samples.append(time.perf_counter() - began)  # issued, not done
    return statistics.median(samples) / _operations(kernels=backend(clock.device).name == "triton")


def _operations(*, kernels: bool) -> int:
    block, pair = _block(CPU)
    recorder = Recorder(block.parameters())
    with card_path(CARD if kernels else None, recorder), recorder:
        _differentiate(block, pair)
    return len(recorder.operations)


def _block(device: torch.device) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    """A transformer block as the trainer makes it; hidden states (2, 64, 64) and a context (2, 77, 64)."""
    unet: Any = UNet2DConditionModel.from_config(_SMALL_UNET)
    patch_unet(torch.nn.Module.to(unet, device=device, dtype=_dtype(device)))  # diffusers' own warns
    block = next(module for module in unet.modules() if isinstance(module, FusedTransformerBlock))
    clock = _Clock(device)
    return block, (clock.draw(2, 64, 64), clock.draw(2, 77, 64))


def _differentiate(block: torch.nn.Module, pair: tuple[Tensor, Tensor]) -> None:
    hidden, context = pair
    out = block(hidden, encoder_hidden_states=context)
    torch.autograd.grad(out, [hidden, *block.parameters()], torch.ones_like(out))


def _path(device: torch.device) -> Path:
    """The file with the figures for this GPU, driver, torch, kernel back end, and way to measure."""
    parts = [
        torch.cuda.get_device_name(device),
        driver(),
        torch.__version__,
        backend(device).name,
        Path(__file__).read_text("utf-8"),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return store.folder() / f"rates-{digest}.json"
