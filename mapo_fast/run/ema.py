"""An exponential moving average of the trained tensors, in fp32 and in system RAM whatever their type.

    average ← d · average + (1 − d) · weights,   d = 0.5^(k / n), every k steps

with `ema.half_life` n in steps and `ema.every` k: a step's weight in the average halves in n steps. In bf16
an average does not move: 1 − d of a difference is below half of a last digit. It begins as the start model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mapo_fast.engine.build import TrainingUnet
from mapo_fast.settings.schema import EmaConfig
from mapo_fast.util.tensorparts import fill


class Ema:
    """The average of one run.

    Args:
        config: half-life and interval.
        tensors: gives the trained tensors by name, always the same ones.
        parts: of the training UNet; streamed weights are read again when tensors have been replaced.
    """

    def __init__(
        self, config: EmaConfig, tensors: Callable[[], Mapping[str, Tensor]], parts: TrainingUnet
    ) -> None:
        assert config.half_life is not None
        self.every = config.every
        self.decay = 0.5 ** (config.every / config.half_life)
        self._tensors, self._parts = tensors, parts
        self.average = {name: _copied(tensor, torch.float32) for name, tensor in tensors().items()}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take the weights after a step into the average, if it is due."""
        if step % self.every:
            return
        for name, tensor in self._tensors().items():
            self.average[name].lerp_(tensor.detach().to("cpu", torch.float32), 1 - self.decay)

    def restore(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the average of a checkpoint."""
        for name, tensor in saved:
            self.average[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the weights' place, and the weights back at the end, to the last bit."""
        weights = {name: _copied(tensor) for name, tensor in self._tensors().items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(weights)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            fill(tensor, values[name])
        if self._parts.weights is not None:
            self._parts.weights.reload()


def _copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)
