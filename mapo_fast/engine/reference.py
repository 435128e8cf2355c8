"""The frozen start model that an objective compares with: r_w and r_l, its errors on a pair's own draw.

Noise, timestep, flip and caption drop are functions of (seed, epoch, pair id), so the reference's errors are
functions of the run's settings and the micro-batch's position, and there are three ways to them:

    adapter       the UNet that is trained, its LoRA switched off: a forward pass more, nothing to keep. Where
                  training goes on from a LoRA (`adapter.start`), the factors of its start are kept and take
                  the place of the trained ones
    copy          a second UNet with the start weights, on the device or streamed from host memory
    precomputed   one pass over every micro-batch of the run before the first step: no second UNet, and no
                  work in a step. They are kept in the run's folder, 8 bytes a pair

No graph is built for any of them. The forward pass is the step's own (batch, arithmetic, kernels), so at the
start of training a pair's margin is 0 and not a rounding error times β; in layout `split`, whose checkpointed
blocks see one half at a time, it is 0 up to rounding.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.engine.step import PairInputs, predict, sample_errors
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.util.records import WrongFileError
from mapo_fast.util.sealed import read_sealed, write_sealed
from mapo_kernels import paired_loss

PART = 256
"""Micro-batches in one file of precomputed errors: the most work that a killed run repeats."""


class StartModel:
    """The start model, ready to predict.

    Args:
        unet: the trained UNet, whose LoRA is switched off to predict; or a frozen copy.
        weights: streams the weights of a copy.
        factors: the start factors of a LoRA that training goes on from. To predict they replace the trained
            factors; the LoRA is then not switched off.
    """

    def __init__(
        self,
        unet: Any,
        weights: WeightStreaming | None = None,
        factors: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.unet, self.weights = unet, weights
        self._adapters = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self._start = [(p, p.detach().clone()) for p in (factors or {}).values()]

    @torch.no_grad()
    def errors(self, inputs: PairInputs, context: AbstractContextManager[Any], at_once: int = 0) -> Tensor:
        """Mean squared errors of 2B samples, (2B,) in fp32 or the target's fp64, chosen half first.

        Args:
            inputs: B pairs.
            context: autocast of the forward pass.
            at_once: samples in one forward pass of layout `sequential`; 0 takes all, as the other layouts do.
        """
        with self._as_at_the_start(), context:
            if at_once:
                parts = [
                    PairInputs(*(x[i : i + at_once] for x in inputs))
                    for i in range(0, len(inputs.noisy), at_once)
                ]
                return torch.cat([sample_errors(predict(self.unet, part), part.target) for part in parts])
            prediction = predict(self.unet, inputs)
        out = paired_loss(prediction, inputs.target, objective="sft")
        return torch.cat([out.chosen_error, out.rejected_error])

    @contextmanager
    def _as_at_the_start(self) -> Iterator[None]:
        """Compute with the start LoRA's factors, or without the LoRA.

        peft's `enable_adapters(False)` would also flip `requires_grad` of every factor.
        """
        if self._start:
            now = [p.data for p, _ in self._start]
            for p, start in self._start:
                p.data = start
            try:
                yield
            finally:
                for (p, _), data in zip(self._start, now, strict=True):
                    p.data = data
            return
        for layer in self._adapters:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._adapters:
                layer._disable_adapters = False


class PrecomputedErrors:
    """The start model's errors for the first micro-batches of a run, kept in a folder.

    Files `errors-000000.safetensors`, … each have `errors` (n, 2P) fp32 for up to `PART` consecutive
    positions. A micro-batch of B ≤ P pairs uses the first 2B, chosen half first. A file also names its run
    and positions. It is whole or absent. A damaged file, or one of another run, is made again.

    Args:
        folder: where the errors are kept.
        identity: everything that the errors depend on.
        batches: the run's micro-batches.
        count: positions that the run will visit.
        device: where the UNet computes.
        processes: the run's processes. They share the work, each keeps all errors, the main one writes them.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        batches: MicroBatches,
        count: int,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.device, self.processes = folder, device, processes
        self._identity = identity
        self.refused: list[str] = []
        """Existing files that are made again, and why."""
        self._table = torch.full((count, 2 * batches.pairs_per_batch), float("nan"))
        if device.type == "cuda":  # only from pinned memory does the copy to the device not wait
            self._table = self._table.pin_memory()
        self._done = {first: self._read(first) for first in range(0, count, PART)}
        """First position of a part → number of its known positions."""

    @property
    def missing(self) -> int:
        """Number of positions whose errors are not known yet."""
        return len(self._table) - sum(self._done.values())

    def positions(self) -> list[int]:
        """Missing positions whose errors this process computes, in order."""
        return [group[self.processes.rank % len(group)] for _, groups in self._groups() for group in groups]

    def compute(self, errors: Iterator[Tensor]) -> Generator[int]:
        """Compute the missing errors, part by part; yields positions as they are done.

        Closing the iterator early keeps what was done. Several processes go together, as many positions at a
        time, and have to stop together.

        Args:
            errors: (2B,) on the device, one for each micro-batch at `positions`, computed as they are
                iterated.
        """
        for first, groups in self._groups():
            known = self._done[first]
            found: list[Tensor] = []
            try:
                for group in groups:
                    mine = next(errors)
                    alone = self.processes.size == 1
                    found += [mine] if alone else self.processes.gathered(mine.cpu())[: len(group)]
                    yield from group
            finally:
                if found:
                    self._keep(first, known, found)

    def _groups(self) -> list[tuple[int, list[range]]]:
        """First position of each part, and its missing positions in groups of one per process."""
        size, parts = self.processes.size, []
        for first, known in self._done.items():
            last = min(first + PART, len(self._table))
            starts = range(first + known, last, size)
            if starts:
                parts.append((first, [range(start, min(start + size, last)) for start in starts]))
        return parts

    def at(self, position: int, pairs: int) -> Tensor:
        """(2B,) fp32 errors of the micro-batch of B pairs at a position, on the device."""
        return self._table[position, : 2 * pairs].to(self.device, non_blocking=True)

    def _read(self, first: int) -> int:
        """Take over a part that is on disk; returns its number of positions."""
        rows, path = self._table[first : first + PART], part_path(self.folder, first)
        try:
            tensors = read_sealed(path, part_of(self._identity, first))
        except WrongFileError as error:
            self.refused.append(f"{path} {error}")
            return 0
        if tensors is None:
            return 0
        found = tensors["errors"]
        known = min(len(found), len(rows))
        rows[:known] = found[:known]
        return known

    def _keep(self, first: int, known: int, found: list[Tensor]) -> None:
        for row, errors in zip(self._table[first + known :], found, strict=False):
            row[: len(errors)] = errors.float().cpu()
        self._done[first] = known + len(found)
        if not self.processes.main:
            return
        rows = self._table[first : first + self._done[first]]
        write_sealed(part_path(self.folder, first), part_of(self._identity, first), {"errors": rows})


def part_path(folder: Path, first: int) -> Path:
    """The file of the `PART` positions from `first` on."""
    return folder / f"errors-{first // PART:06d}.safetensors"


def part_of(identity: dict[str, Any], first: int) -> dict[str, Any]:
    """Identity record in the file of the `PART` positions from `first` on."""
    return {"what": "errors of the start model", "position": first, **identity}
