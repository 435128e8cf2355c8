"""Regional `torch.compile`: the transformer blocks, which are most of an SDXL UNet and alike.

A block's `forward` is compiled and not its call, so hooks (streamed weights) run outside. All blocks share
one compiled function: dynamo compiles it once for every width of a block, for a batch of one and of several
samples, and for inputs with and without a gradient, but not for every block; and sizes are symbols, so an
aspect bucket compiles nothing.

What a step predicts without gradients (a reference; the extra forward of layout `sequential`) has to have the
bits of what it predicts with them, so the same code runs, as if there were gradients; what a block saves for
them is dropped after it. Evaluations and previews, in eval mode, run the blocks as they are.

The fused operators stay what they are inside: what they recompute in backward is not saved.
"""

from __future__ import annotations

import time
import weakref
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch._dynamo.callback import callback_handler

from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_kernels import backend

BACKEND = "inductor"
"""torch.compile's own default."""

VARIANTS = 32
"""Most compiled variants of one block's code. A quantised LoRA in `split` takes up to 7 for each of SDXL's
two widths; torch's own limit is 8."""


class CompiledBlocks:
    """Compiles the transformer blocks of a UNet, in place, when each kind of them first runs.

    Compiled code and torch's limit belong to this object and go with it, so several trainings in one process
    do not affect each other.
    """

    def __init__(self, unet: Any) -> None:
        limit = torch._dynamo.config.recompile_limit
        weakref.finalize(self, setattr, torch._dynamo.config, "recompile_limit", limit)
        torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
        self._clock = _Clock()
        weakref.finalize(self, self._clock.end)
        self._compiled: dict[type, Any] = {}
        self.add(unet)

    @property
    def seconds(self) -> float:
        """Seconds spent on compiling so far."""
        return self._clock.seconds

    def add(self, unet: Any) -> None:
        """Compile another UNet's blocks too, with the same code; they must be of the same kinds."""
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                kind = type(block)
                if kind not in self._compiled:
                    self._compiled[kind] = _where_steps_are(kind.forward)
                block.forward = MethodType(self._compiled[kind], block)


def refuse_without_triton(config: Config, device: torch.device) -> None:
    """Refuse `speed.compile` on a GPU without Triton, which Inductor compiles to.

    Raises:
        UserError: speed.compile on a GPU where Triton cannot start; the message says why.
    """
    if config.speed.compile and device.type == "cuda" and (found := backend(device)).name == "eager":
        raise UserError(f"speed.compile = true needs Triton; {found.reason}. Or set speed.compile = false")


class _Clock:
    """Adds up the seconds of compiling, until `end`."""

    def __init__(self) -> None:
        self.seconds, self._started = 0.0, 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._stop)

    def end(self) -> None:
        with suppress(ValueError):  # `torch._dynamo.reset` has removed them
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def _where_steps_are(forward: Any) -> Any:
    compiled: Any = torch.compile(_with_own_code(forward), backend=BACKEND, dynamic=True, fullgraph=True)

    def run(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return forward(block, hidden_states, *args, **kwargs)
        if torch.is_grad_enabled():
            return compiled(block, hidden_states, *args, **kwargs)
        with torch.enable_grad():
            return compiled(block, hidden_states.detach().requires_grad_(), *args, **kwargs).detach()

    return run


def _with_own_code(function: Any) -> Any:
    """A function with its own copy of the code: dynamo finds and counts what it has compiled by the code."""
    made = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
