"""GPU memory of a run: planned before anything is loaded, capped while it trains, explained when it runs out.

A driver that runs out of GPU memory may go on in system RAM, at a tenth of the speed, and say nothing. So the
allocator is capped at what was planned for: what does not fit then fails at once, with planned and actual
figures side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from mapo_fast.config import Config
from mapo_fast.errors import UserError
from mapo_fast.model import SDXLFolder
from mapo_fast.planner.ask import plan_run, refusal
from mapo_fast.planner.cards import CONTEXT_GIB, GIB, parse_size, vram_for
from mapo_fast.planner.plan import Plan, with_settings
from mapo_fast.planner.search import Outcome


class Budget(NamedTuple):
    """What a run may use and what it is expected to use."""

    device: torch.device
    vram: int
    """Bytes, with the CUDA context."""
    plan: Plan
    smaller: Plan | None
    """The fastest plan that needs at least a twentieth less, for a run that fails."""
    rates: str
    """Where the rates come from by which the plan was chosen."""

    def notes(self) -> list[str]:
        """What the user should know before the first step."""
        notes = [
            f"memory plan: {self.plan.name}; {self.plan.peak / GIB:.2f} GiB and {self.plan.ms:.0f} ms a "
            f"step predicted (train.vram), rates {self.rates}"
        ]
        if self.plan.changes:
            notes.append(f"no exact plan fits: {', '.join(self.plan.changes)}")
        if self.device.type == "cuda":
            free = _free(self.device) + torch.cuda.memory_reserved(self.device)  # the run has loaded already
            needed = vram_for(self.plan.peak)
            if free + CONTEXT_GIB * GIB < needed:
                notes.append(
                    f"the plan needs {needed / GIB:.1f} GiB of GPU memory and only {free / GIB:.1f} are "
                    "free: other programs hold the rest (nvidia-smi lists them); close them or lower "
                    "train.vram"
                )
        return notes

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Cap the allocator at the budget, and explain when that is not enough.

        Raises:
            UserError: out of GPU memory: planned, actual, and the next smaller plan.
        """
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            _cap((self.vram - CONTEXT_GIB * GIB) / total, self.device)
        try:
            yield
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(self._out_of_memory()) from error
        finally:
            if self.device.type == "cuda":
                with suppress(RuntimeError):  # of a device that an error has left unusable
                    _cap(1.0, self.device)

    def _out_of_memory(self) -> str:
        planned = f"the plan ({self.plan.name}) expected {self.plan.peak / GIB:.2f} GiB"
        actual = ""
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device) / GIB
            reserved = torch.cuda.max_memory_reserved(self.device) / GIB
            actual = f", {allocated:.2f} were allocated and {reserved:.2f} reserved"
        if self.smaller is None:
            advice = "there is no smaller plan for these settings: lower data.resolution or state less of it"
        else:
            vram = f"{vram_for(self.smaller.peak) / GIB:.1f}GiB"
            advice = (
                f"the next smaller plan ({self.smaller.name}, {self.smaller.peak / GIB:.2f} GiB) is that of "
                f"--set train.vram={json.dumps(vram)}"
            )
        return f"out of GPU memory: {planned}{actual}; {advice}"


ARITHMETIC = ("train.fused_step", "train.precision", "optim.name", "adapter.base")
"""Settings that a plan may choose and a resumed run has to keep."""


def planned(
    config: Config, folder: SDXLFolder, device: torch.device, recorded: dict[str, Any] | None = None
) -> tuple[Config, Budget | None]:
    """The config with the fastest plan for train.vram, or for the free memory of a GPU.

    Args:
        recorded: settings of the run to resume, section by section: what the updates depend on is kept.

    Returns:
        The config as it is and None on the CPU without train.vram.

    Raises:
        UserError: train.vram is no size, or nothing fits; the message names the smallest change that would.
    """
    if config.train.vram is not None:
        vram = parse_size(config.train.vram, "train.vram")
    elif device.type == "cuda":
        # What this process has cached and does not use is free to it; asking has made the context.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        vram = _free(device) + cached + int(CONTEXT_GIB * GIB)
    else:
        return config, None
    if recorded is not None:
        config = with_settings(config, _open(config, recorded))
    outcome = plan_run(config, folder, vram, device)
    if outcome.chosen is None:
        raise UserError(refusal(outcome))
    budget = Budget(
        device, vram, outcome.chosen, _smaller(outcome, outcome.chosen), outcome.card.rates.source
    )
    return outcome.chosen.apply(config), budget


def _open(config: Config, recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded values of `ARITHMETIC` that the config does not state."""
    found = {}
    for name in ARITHMETIC:
        section, key = name.split(".")
        if key not in getattr(config, section).model_fields_set:
            found[name] = recorded[section][key]
    return found


def _smaller(outcome: Outcome, chosen: Plan) -> Plan | None:
    host = outcome.host
    others = [
        plan
        for plan, _ in outcome.others
        if plan.peak < 0.95 * chosen.peak and plan.pinned <= host.pinnable and plan.host <= host.ram
    ]
    return min(others, key=lambda plan: plan.ms, default=None)


def _cap(share: float, device: torch.device) -> None:
    """Cap the allocator at a share of the card; unlike its siblings, torch's function needs an index."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), index)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """The allocator's own error, or a library's that got no memory beside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED"))


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])
