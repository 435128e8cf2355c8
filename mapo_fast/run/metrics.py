"""Training figures summed on the device and fetched together, once per logging interval."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.optim import GuardedOptimizer
from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.loss import LossOutput
from mapo_fast.run.monitor import SATURATED_BELOW

_EVERY = ("loss", "logits", "saturation", "saturated", "accuracy")
_HALVES = ("chosen_error", "rejected_error")


class Metrics:
    """Sums over the pairs and steps since the last `reset`.

    `margin` is mean(e_l − e_w). `saturation` is mean σ(logit): the used-up share of the margin's gradient,
    near 1 for learnt pairs. `saturated` is the share of pairs with less than 0.05 of it left, `accuracy` the
    share with logit > 0. Single images count as half a pair. Their `chosen_error` is that of wanted images,
    `rejected_error` that of the others; they have no `margin`. A micro-batch with a figure that is not finite
    is left out of the sums: its step is skipped and counted. Each process sums its own pairs; `fetch` and
    `state`, which all processes call, add them up.
    """

    def __init__(self, device: torch.device, processes: Processes = ALONE, *, paired: bool = True) -> None:
        self.processes, self.paired = processes, paired
        self._pairs = torch.zeros(len(_EVERY) + 1 + 2 * len(_HALVES), dtype=torch.float64, device=device)
        """Sums of `_EVERY`, their number, then the sum and number of each of `_HALVES`."""
        self._before = self._pairs.clone()
        self._steps = torch.zeros(2, dtype=torch.float64, device=device)
        self.restart_clock()

    def begin(self) -> None:
        """A step begins."""
        self._before.copy_(self._pairs)

    def drop(self) -> None:
        """Forget the step that was begun."""
        self._pairs.copy_(self._before)

    def restart_clock(self) -> None:
        """Leave the time since the last step (evaluation, saving) out of pairs per second."""
        self._started, self._timed = time.perf_counter(), 0.0

    def state(self) -> dict[str, list[float]]:
        """The sums since the last `reset`, for a checkpoint inside a logging interval."""
        pairs = self.processes.sum_(self._pairs.clone())
        return {"pairs": pairs.tolist(), "steps": self._steps.tolist()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Take over what `state` gave."""
        if self.processes.main:
            self._pairs.copy_(torch.tensor(state["pairs"], dtype=torch.float64))
        self._steps.copy_(torch.tensor(state["steps"], dtype=torch.float64))

    def add(self, out: LossOutput) -> None:
        """Add one micro-batch's loss output of B pairs, or 2B single samples."""
        ones = torch.ones_like(out.logits)
        chosen, rejected = out.halves
        rows = torch.stack(
            [
                out.loss.detach().expand(len(ones)),
                out.logits,
                torch.sigmoid(out.logits),
                (torch.sigmoid(-out.logits) < SATURATED_BELOW).to(ones.dtype),
                out.correct.to(ones.dtype),
                ones,
                *chosen,
                *rejected,
            ]
        )
        sums = rows.double().sum(dim=1)
        self._pairs += torch.where(torch.isfinite(sums).all(), sums, torch.zeros_like(sums))
        self._timed += out.pairs

    def add_step(self, norm: Tensor) -> None:
        """Add one optimizer step's gradient norm, 0-d; a step that is not finite is left out."""
        finite = torch.isfinite(norm)
        self._steps += torch.stack([torch.where(finite, norm, torch.zeros_like(norm)), finite.to(norm.dtype)])

    def fetch(self, optimizer: GuardedOptimizer | FusedStep) -> tuple[dict[str, float], int]:
        """Means since the last `reset`, and how many steps in a row were skipped; waits for the device."""
        fused = optimizer if isinstance(optimizer, FusedStep) else None
        tensors = torch.zeros_like(optimizer.skipped) if fused is None else fused.skipped_tensors
        counters = torch.stack([tensors, optimizer.skipped, optimizer.skipped_in_a_row]).double()
        pairs_of_all = self.processes.sum_(self._pairs.clone())
        values = torch.cat([pairs_of_all, self._steps, counters]).tolist()
        seconds = time.perf_counter() - self._started
        *sums, count, chosen, n_chosen, rejected, n_rejected = values[: len(self._pairs)]
        norms, steps, skipped_tensors, skipped, in_a_row = values[len(self._pairs) :]
        halves = (chosen, n_chosen), (rejected, n_rejected)
        means = [*((total, count) for total in sums), *halves]
        figures = {
            name: total / n if n else float("nan")
            for name, (total, n) in zip((*_EVERY, *_HALVES), means, strict=True)
        }
        if self.paired:
            figures["margin"] = figures["rejected_error"] - figures["chosen_error"]
        figures["grad_norm"] = norms / steps if steps else float("nan")
        timed = sum(self.processes.gathered(self._timed))
        figures["pairs_per_s"] = timed / seconds
        figures["skipped_steps"] = skipped
        if fused is not None:
            figures["skipped_tensors"] = skipped_tensors
        return figures, int(in_a_row)

    def reset(self) -> None:
        """Begin another interval, once the figures are written."""
        self._pairs.zero_()
        self._steps.zero_()
        self.restart_clock()


def peak_memory_mib(device: torch.device) -> float:
    """Peak allocated memory on a GPU, peak resident memory of the process on the CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
