"""The input of a run's steps: its micro-batches in order, as inputs of the UNet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from mapo_fast.data.cache import CachedPair, PairCache
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.prefetch import MicroBatch
from mapo_fast.engine.processes import Processes
from mapo_fast.engine.reference import PrecomputedErrors
from mapo_fast.engine.step import PairInputs, training_inputs, upload
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.run.health import made_finite
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError


class Feed:
    """The micro-batches of one process of a run.

    Args:
        config: the run's settings.
        cache: where the pairs are.
        diffusion: noise schedule and target.
        device: where the UNet is.
        processes: the run's processes; the r-th of W takes micro-batches r, r + W, r + 2W, …
    """

    def __init__(
        self,
        config: Config,
        cache: PairCache,
        diffusion: Diffusion,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.cache, self.diffusion = config, cache, diffusion
        self.device, self.processes = device, processes
        self.batches = MicroBatches(
            cache.train, config.train.pairs_per_batch, config.train.seed, paired=cache.paired
        )
        self.reference: PrecomputedErrors | None = None
        """The start model's errors, where they were computed before the first step."""

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's micro-batches of all steps from `step` on."""
        count = self.config.train.accumulation * self.processes.size
        for first in range(step * count, self.config.train.steps * count, count):
            found = [self.batches.at(first + i) for i in range(count)]
            total = sum(len(pairs) for _, pairs in found)
            for i in range(self.processes.rank, count, self.processes.size):
                position, (epoch, pairs) = first + i, found[i]
                inputs, known = self.inputs(epoch, pairs), None
                if self.reference is not None:
                    known = self.reference.at(position, len(inputs.noisy) // 2)
                yield MicroBatch(inputs, len(pairs) / total, known, self._labels(pairs))

    def inputs(self, epoch: int, pairs: list[CachedPair]) -> PairInputs:
        """Inputs of the UNet for these pairs in this epoch."""
        return training_inputs(
            self.cache,
            pairs,
            self.diffusion,
            seed=self.config.train.seed,
            epoch=epoch,
            caption_dropout=self.config.train.caption_dropout,
            device=self.device,
        )

    @cached_property
    def finite_input(self) -> PairInputs | None:
        """The first micro-batch, in host memory, with zeros for values that are not finite; None if
        unreadable.

        The model's health is checked on it, and a missing file must not cost the trained model.
        """
        try:
            return made_finite(self.inputs(*self.batches.at(0)))
        except (UserError, OSError):
            return None

    def _labels(self, pairs: list[CachedPair]) -> Tensor | None:
        """(B,) soft labels on the device, for an objective that needs them; (2B,) for single images."""
        if not self.config.objective.known.labelled:
            return None
        read = self.cache.labels if self.cache.paired else self.cache.wanted
        return upload(read(pairs), self.device)
