"""Held-out evaluation: how far the model has moved from its start on pairs it does not train on.

Preference accuracy (chosen error < rejected error) has no 50 % baseline: an untrained denoiser prefers, for
instance, blurred images almost always. So every figure is a change from the start model on the same pairs,
the same stratified timesteps and the same noise, and the confidence interval is the paired one over pairs.
The start model's errors and a sample of its predictions are written once, at step 0, and read on resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_fast.data.cache import CachedPair, PairBatch, PairCache, SampleBatch
from mapo_fast.engine.draws import pair_noise, stratified_timesteps
from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.engine.step import pair_inputs, predict, sample_inputs
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.util.records import WrongFileError
from mapo_fast.util.sealed import read_sealed, write_sealed
from mapo_fast.util.students_t import half_width


class HeldOutErrors(NamedTuple):
    """Denoising errors of one model on the held-out pairs, or single images."""

    chosen: Tensor  # (pairs, draws) fp32, CPU; for single images those that are wanted
    rejected: Tensor  # (pairs, draws) fp32, CPU; for single images those that are not
    predictions: list[Tensor]  # one draw per pair: chosen and rejected prediction, (2, C, h, w) fp16, CPU
    paired: bool = True

    def part(self, first: int, last: int) -> HeldOutErrors:
        """The errors of draws `first` to `last` − 1."""
        return self._replace(chosen=self.chosen[:, first:last], rejected=self.rejected[:, first:last])


class HeldOut:
    """The fixed held-out pairs, timesteps and noise of one run.

    Args:
        cache: where the pairs are.
        pairs: the held-out pairs to use.
        diffusion: noise schedule and target.
        draws: timesteps per pair, one from each of as many strata.
        draws_per_batch: draws that go through the UNet together; at the run's pairs per micro-batch,
            evaluation needs no more memory than training.
        seed: the run's seed.
        device: the UNet's device.
        processes: the run's processes; they share the pairs.
    """

    def __init__(
        self,
        cache: PairCache,
        pairs: Sequence[CachedPair],
        diffusion: Diffusion,
        *,
        draws: int,
        draws_per_batch: int,
        seed: int,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.cache, self.pairs, self.diffusion = cache, list(pairs), diffusion
        self.draws, self.draws_per_batch = draws, draws_per_batch
        self.seed, self.device = seed, device

    @torch.no_grad()
    def errors(
        self, unet: Any, context: AbstractContextManager[None], poll: Callable[[], None] = lambda: None
    ) -> HeldOutErrors:
        """Chosen and rejected errors of every pair at every draw, in all processes.

        Each process takes every W-th pair, and all take equally many: a split UNet runs in all of them or in
        none. `poll` is called before each batch, in all processes together; an exception in it ends the
        evaluation.
        """
        count, (rank, size) = len(self.pairs), (self.processes.rank, self.processes.size)
        mine = []
        training = unet.training
        unet.eval()
        try:
            with context:
                for place in range(rank, -(-count // size) * size, size):
                    index = place % count
                    mine.append(self._pair_errors(unet, self.pairs[index], index % self.draws, poll))
        finally:
            unet.train(training)
        shared = self.processes.gathered([(rows.cpu(), kept.cpu()) for rows, kept in mine])
        results = [result for row in zip(*shared, strict=True) for result in row][:count]
        stack = torch.stack([rows for rows, _ in results], dim=1)
        predictions = [kept for _, kept in results]
        if self.cache.paired:
            return HeldOutErrors(stack[0], stack[1], predictions)
        wanted = self.cache.wanted(self.pairs)
        return HeldOutErrors(stack[0, wanted], stack[0, ~wanted], predictions, paired=False)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the chosen and rejected error tensors."""
        chosen = rejected = len(self.pairs)
        if not self.cache.paired:
            chosen = int(self.cache.wanted(self.pairs).sum())
            rejected -= chosen
        return (chosen, self.draws), (rejected, self.draws)

    def _pair_errors(
        self, unet: Any, pair: CachedPair, keep: int, poll: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """(2, draws) errors of one pair, and its (2, C, h, w) prediction at draw `keep`.

        For a single image the first dimension is 1.
        """
        read = self.cache.batch if self.cache.paired else self.cache.samples
        single: PairBatch | SampleBatch = self.processes.each(lambda: read([pair], flip=None, drop=None))
        latents, halves = (single.chosen_latents, 2) if isinstance(single, PairBatch) else (single.latents, 1)
        shape = tuple(latents.shape[1:])
        timesteps = stratified_timesteps(
            self.seed, "held-out", pair.id, self.diffusion.num_train_timesteps, self.draws
        )
        errors, kept = [], None
        for first in range(0, self.draws, self.draws_per_batch):
            poll()
            draws = range(first, min(first + self.draws_per_batch, self.draws))
            batch = type(single)(*(t.expand(len(draws), *t.shape[1:]) for t in vars(single).values()))
            noise = torch.stack([pair_noise(self.seed, "held-out", pair.id, shape, draw=d) for d in draws])
            steps = torch.tensor([timesteps[d] for d in draws])
            if isinstance(batch, PairBatch):
                inputs = pair_inputs(batch, noise, steps, self.diffusion, self.device)
            else:
                inputs = sample_inputs(batch, noise, steps, self.diffusion, self.device)
            prediction = predict(unet, inputs).float()
            error = (prediction - inputs.target).square().mean(dim=(1, 2, 3))
            errors.append(error.view(halves, len(draws)))
            if keep in draws:
                kept = prediction.view(halves, len(draws), *shape)[:, keep - first].half()
        assert kept is not None
        return torch.cat(errors, dim=1), kept


class PairedChange(NamedTuple):
    """A mean over pairs of (now − start), with its 95 % interval; None for the interval of a single pair."""

    mean: float
    low: float | None
    high: float | None


def paired_change(now: Tensor, start: Tensor) -> PairedChange:
    """Mean change and 95 % interval by Student's t; both inputs are (pairs,), one value a pair."""
    change = (now - start).double()
    mean = float(change.mean())
    if len(change) < 2:
        return PairedChange(mean, None, None)
    half = half_width(0.95, len(change) - 1) * float(change.std()) / math.sqrt(len(change))
    return PairedChange(mean, mean - half, mean + half)


BINS = 4
"""Noise levels that figures are also given for: equal parts of the timesteps, from little noise to much."""


def compare(now: HeldOutErrors, start: HeldOutErrors) -> dict[str, Any]:
    """Figures of one evaluation, each against the start model: over all timesteps, and in each of `BINS`.

    Single images have no accuracy and no margin. Reported are the changes of the wanted and of the unwanted
    images' errors, where there are such images.

    Draw d of D is of the d-th of D equal parts of the timesteps (`engine.draws.stratified_timesteps`), so the
    draws are cut into `BINS` runs. `bins` has the figures of each, by its share of the timesteps: `0-25%`.

    `drift` is Σ‖prediction − start prediction‖² / Σ‖start prediction‖².
    """

    moved = sum(
        float((a.float() - b.float()).square().sum())
        for a, b in zip(now.predictions, start.predictions, strict=True)
    )
    size = sum(float(b.float().square().sum()) for b in start.predictions)
    draws = now.chosen.shape[1]
    edges = [draws * part // BINS for part in range(BINS + 1)]
    bins = {
        f"{first / draws:.0%}-{last / draws:.0%}".replace("%-", "-"): _changes(
            now.part(first, last), start.part(first, last)
        )
        for first, last in pairwise(edges)
    }
    counted = {"pairs": len(now.chosen)} if now.paired else {"images": len(now.predictions)}
    drift = moved / size if size else 0.0
    return {**counted, "draws": draws, **_changes(now, start), "drift": drift, "bins": bins}


def _changes(now: HeldOutErrors, start: HeldOutErrors) -> dict[str, Any]:
    """The figures of some draws, each with its change and the interval of that."""
    figures: dict[str, Any] = {}
    if now.paired:
        right, before = accuracy(now), accuracy(start)
        figures |= {
            "accuracy": float(right.mean()),
            "accuracy_start": float(before.mean()),
            "accuracy_change": paired_change(right, before)._asdict(),
            "margin_change": paired_change(_margin(now), _margin(start))._asdict(),
        }
    for name in ("chosen",) if now.paired else ("chosen", "rejected"):
        one, other = getattr(now, name), getattr(start, name)
        if len(one):
            figures[f"{name}_error"] = float(one.mean())
            figures[f"{name}_error_change"] = paired_change(one.mean(dim=1), other.mean(dim=1))._asdict()
    return figures


def accuracy(errors: HeldOutErrors) -> Tensor:
    """Preference accuracy of each pair, (pairs,) fp64: its share of draws that rank it right.

    NaN where an error is not finite.
    """
    finite = torch.isfinite(errors.chosen) & torch.isfinite(errors.rejected)
    correct = (errors.chosen < errors.rejected).double()
    return torch.where(finite, correct, float("nan")).mean(dim=1)


def _margin(errors: HeldOutErrors) -> Tensor:
    """Mean of rejected − chosen error of each pair, (pairs,) fp64."""
    return (errors.rejected - errors.chosen).double().mean(dim=1)


def start_of(run: str) -> dict[str, Any]:
    """Identity record in the file of the start model's errors; `run` is the run's id."""
    return {"what": "held-out errors of the start model", "run": run, "step": 0}


def save_errors(errors: HeldOutErrors, path: Path, run: str) -> None:
    """Write the start model's errors and predictions, atomically."""
    tensors = {f"prediction.{i}": p for i, p in enumerate(errors.predictions)}
    write_sealed(path, start_of(run), {"chosen": errors.chosen, "rejected": errors.rejected, **tensors})


def load_errors(path: Path, run: str, held_out: HeldOut) -> HeldOutErrors | None:
    """Read the file that `save_errors` wrote; None where there is none.

    Raises:
        WrongFileError: the file is damaged, another run's, or of other pairs or draws.
    """
    tensors = read_sealed(path, start_of(run))
    if tensors is None:
        return None
    try:
        predictions = [tensors[f"prediction.{i}"] for i in range(len(tensors) - 2)]
        errors = HeldOutErrors(
            tensors["chosen"], tensors["rejected"], predictions, paired=held_out.cache.paired
        )
    except KeyError as error:
        raise WrongFileError(f"holds no {error}") from None
    shapes = tuple(errors.chosen.shape), tuple(errors.rejected.shape)
    if len(predictions) != len(held_out.pairs) or shapes != held_out.shapes:
        raise WrongFileError("is of other pairs or draws")
    return errors


def start_errors(
    path: Path,
    run: str,
    held_out: HeldOut,
    unet: Any,
    context: AbstractContextManager[None],
    poll: Callable[[], None] = lambda: None,
) -> tuple[HeldOutErrors | None, list[str]]:
    """The start model's errors, read, or else measured and written; all processes call this together.

    Args:
        path: the file that keeps them.
        run: the run's id.
        held_out: the run's held-out pairs.
        unet: the start model.
        context: autocast of its forward passes.
        poll: called before each batch, see `HeldOut.errors`.

    Returns:
        The errors, None where no pair is held out; and lines to show.
    """
    if not held_out.pairs:
        return None, []

    def load() -> tuple[HeldOutErrors | None, list[str]]:
        try:
            return load_errors(path, run, held_out), []
        except WrongFileError as error:
            return None, [f"{path} {error}: measured again"]

    errors, notes = held_out.processes.once(load)
    if errors is None:
        errors = measured = held_out.errors(unet, context, poll)
        held_out.processes.once(lambda: save_errors(measured, path, run))
    return errors, notes
