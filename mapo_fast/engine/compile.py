"""Regional `torch.compile`: the transformer blocks, which are most of an SDXL UNet and alike.

A block's `forward` is compiled and not its call, so hooks (streamed weights) run outside. All blocks share
one compiled function: dynamo compiles it once for every width of a block, for a batch of one and of several
samples, and for inputs with and without a gradient, but not for every block; and sizes are symbols, so an
aspect bucket compiles nothing. Without gradients (evaluation, previews) blocks run as they are.

The fused operators stay what they are inside: what they recompute in backward is not saved.
"""

from __future__ import annotations

import time
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch._dynamo import callback

BACKEND = "inductor"
"""torch.compile's own default."""


class CompiledBlocks:
    """Compiles the transformer blocks of a UNet, in place, when each kind of them first runs.

    `seconds` is what has been spent on compiling since.
    """

    def __init__(self, unet: Any) -> None:
        self.seconds = 0.0
        self._started = 0.0
        callback.on_compile_start(self._start)
        callback.on_compile_end(self._end)
        compiled: dict[type, Any] = {}
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                kind = type(block)
                if kind not in compiled:
                    compiled[kind] = _where_gradients_are(kind.forward)
                block.forward = MethodType(compiled[kind], block)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def _where_gradients_are(forward: Any) -> Any:
    compiled = torch.compile(forward, backend=BACKEND, dynamic=True, fullgraph=True)

    def run(block: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(block, *args, **kwargs)

    return run
