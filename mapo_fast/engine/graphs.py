"""A whole step as one CUDA graph: forward, backward and update, launched at once.

A graph is a list of kernels with fixed addresses and fixed numbers. So everything that differs from step to
step lies in tensors: the inputs are copied into buffers of the graph's own, the learning rate is a tensor,
step counts, skip flags and the norm of the step before are updated in place, and random bits are functions of
the step count. What Python holds must be the same in every step.

One graph for every shape of the inputs, thus for every aspect bucket and for its smaller last micro-batch.
The first step of a shape runs as usual, on the stream that the second one is captured on: it compiles kernels
and makes optimizer states. Capturing computes nothing; the replay that follows does.

Memory. All graphs share one pool, as only one of them runs at a time. Everything that a captured step makes
comes from it, gradients too, and it stays reserved, as large as the largest step. Whatever runs outside
(evaluation, previews, the first step of a shape) comes on top, so the planner counts a step's own memory
twice: `graph buffers`. A shape's first step gives its memory back before the capture. Two things are not
predicted: a graph's inputs, a few MiB for each shape, and memory that graphs of different shapes cannot share
because one shape's blocks are too small for another's tensors: at worst one step's memory per further shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError

MOST_GRAPHS = 32
"""Most graphs kept, one per shape; the one not used for longest is dropped and captured again when needed."""

Step = Callable[[Sequence[Tensor | None]], Any]


class Captured(NamedTuple):
    """A step that can be replayed."""

    replay: Callable[[], None]
    inputs: list[Tensor | None]
    """Buffers that the graph reads its inputs from."""
    result: Any
    """Tensors that it writes."""
    kept: Any
    """Objects that have to live as long as the graph."""


class StepGraphs:
    """Runs a step on some tensors, from the second time on as a graph.

    Args:
        step: takes the tensors; returns tensors, or tuples of them, without a graph for autograd. Leaves
            nothing else: all results are written in place.
        device: the GPU.
        keep: called after a capture; returns what has to live as long as the graph.
    """

    def __init__(self, step: Step, device: torch.device, keep: Callable[[], Any] = lambda: None) -> None:
        self._step, self._keep, self._device = step, keep, device
        self._seen: set[Any] = set()
        self._captured: OrderedDict[Any, Captured] = OrderedDict()
        self._stream: Any = None
        self._pool: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tensors: Sequence[Tensor | None]) -> Any:
        """What `step` returns; of a graph, valid until the next call."""
        key = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
        captured = self._captured.pop(key, None)
        if captured is None:
            if key not in self._seen:
                self._seen.add(key)
                return self._first(tensors)
            while len(self._captured) >= MOST_GRAPHS:
                self._wait()  # it may be running
                self._captured.popitem(last=False)
            captured = self._capture([None if t is None else torch.empty_like(t) for t in tensors])
        self._captured[key] = captured
        for buffer, tensor in zip(captured.inputs, tensors, strict=True):
            if buffer is not None and tensor is not None:
                buffer.copy_(tensor, non_blocking=True)
        captured.replay()
        return captured.result

    def _first(self, tensors: Sequence[Tensor | None]) -> Any:
        """Run it on the graphs' stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step(tensors)
        current.wait_stream(self._stream)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                made.record_stream(current)
        for given in tensors:
            if given is not None:
                given.record_stream(self._stream)
        return result

    def _capture(self, inputs: list[Tensor | None]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        # Relaxed: the thread that reads ahead allocates meanwhile, and the optimizer allocates pinned memory
        # for its tables of addresses. Neither is anything that the graph would have to repeat.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
            result = self._step(inputs)
        return Captured(graph.replay, inputs, result, self._keep())

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def check_capture(config: Config, device: torch.device) -> None:
    """Refuse `speed.cuda_graph` where a step cannot be captured.

    Raises:
        UserError: naming the setting and what to use instead.
    """
    if config.speed.cuda_graph and device.type != "cuda":
        raise UserError("speed.cuda_graph = true needs an NVIDIA GPU; or set speed.cuda_graph = false")
