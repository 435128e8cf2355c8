"""GPU memory of a run: planned before anything is loaded, capped while it trains, explained when it runs out.

A driver that runs out of GPU memory may silently go on in system RAM, at a tenth of the speed. So the
allocator is capped at the planned memory: a step that does not fit then fails at once, with planned and
actual figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psutil
import torch

from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.hardware import gpu
from mapo_fast.hardware.cards import CONTEXT_GIB, vram_for
from mapo_fast.hardware.holders import gpus, held_text, of_uuid
from mapo_fast.hardware.host import host
from mapo_fast.hardware.names import find_card
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.planner import shipped
from mapo_fast.planner.answer import RAM
from mapo_fast.planner.ask import plan_run, refusal
from mapo_fast.planner.plan import Plan, PlanResult
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import kept_at_resume
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, parse_size, size_text


class Budget(NamedTuple):
    """GPU memory that a run may use, and its plan."""

    device: torch.device
    vram: int
    """Bytes that the run may use, with the CUDA context."""
    plan: Plan
    smaller: Plan | None
    """The fastest plan that needs at least a twentieth less, for a run that fails."""
    rates: str
    """Where the rates that the plan was chosen by come from."""
    source: str
    """Where `vram` comes from."""
    shortage: str = ""
    """Why `vram` is less than the config asks for; empty where it is not."""

    def notes(self) -> list[str]:
        """Lines to show before the first step."""
        notes = [
            f"memory plan: {self.plan.name}; {self.plan.peak / GIB:.2f} GiB, {self.plan.reserved / GIB:.2f} "
            f"reserved, and {self.plan.time} predicted for {self.vram / GIB:.2f} GiB ({self.source}), rates "
            f"{self.rates}"
        ]
        if self.shortage:
            notes.append(self.shortage)
        if self.plan.changes:
            notes.append(f"no exact plan fits: {', '.join(self.plan.changes)}")
        if self.device.type == "cuda":
            loaded = torch.cuda.memory_reserved(self.device)
            free = gpu.free(self.device) + loaded
            needed = vram_for(self.plan.reserved)
            if free + CONTEXT_GIB * GIB < needed:
                notes.append(
                    f"the plan needs {needed / GIB:.1f} GiB of GPU memory and only {free / GIB:.1f} are "
                    "free: other programs hold the rest (nvidia-smi lists them); close them or lower "
                    "train.vram"
                )
        return notes

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Cap the allocator at the budget, and explain an out-of-memory error.

        Raises:
            UserError: out of GPU memory: planned, actual, and the next smaller plan; or out of system RAM.
        """
        if self.device.type == "cuda":
            gpu.cap(self.vram - CONTEXT_GIB * GIB, self.device)
        try:
            yield
        except RuntimeError as error:
            if self._is_of_the_host(error):
                raise UserError(self._out_of_ram()) from error
            if not gpu.is_out_of_memory(error):
                raise
            raise UserError(self._out_of_memory()) from error
        finally:
            if self.device.type == "cuda":
                gpu.uncap(self.device)

    def _is_of_the_host(self, error: RuntimeError) -> bool:
        """Whether system RAM has run out: CUDA raises the same error when it can pin no more of it."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        if "DefaultCPUAllocator" in str(error):
            return True
        if "CUDA error: out of memory" not in str(error) or self.device.type != "cuda":
            return False
        try:
            return gpu.free(self.device) > ENOUGH_FOR_A_LIBRARY
        except RuntimeError:  # the error has left the device unusable
            return False

    def _out_of_ram(self) -> str:
        return (
            f"out of system RAM: the plan ({self.plan.name}) expected {self.plan.host / GIB:.1f} GiB of it, "
            f"{self.plan.pinned / GIB:.1f} pinned, and {psutil.virtual_memory().available / GIB:.1f} are "
            "free: close other programs, or set offload.optimizer, offload.weights or offload.activations to "
            "'gpu'"
        )

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
            vram = size_text(vram_for(self.smaller.reserved))
            advice = (
                f"the next smaller plan ({self.smaller.name}, {self.smaller.peak / GIB:.2f} GiB) is that of "
                f"--set train.vram={json.dumps(vram)}"
            )
        return f"out of GPU memory: {planned}{actual}; {advice}"


ENOUGH_FOR_A_LIBRARY = GIB // 2
"""Free bytes on the card with which no library's own allocation fails."""


def is_planned(config: Config, device: torch.device, processes: Processes = ALONE) -> bool:
    """Whether a run has a memory plan: on a GPU, or if train.vram is set; never for a split model."""
    return not processes.shard(config) and (device.type == "cuda" or config.train.vram is not None)


def planned(
    config: Config,
    model: Callable[[], Pipeline],
    device: torch.device,
    recorded: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> tuple[Config, Budget | None]:
    """The config with the fastest plan for train.vram, or for the free memory of a GPU.

    Several processes take the plan of the GPU with the least free memory; process 0 makes it.

    Args:
        model: opens the model's folder, if a plan is needed.
        recorded: settings of the run to resume, section by section; those that the updates depend on are
            kept.

    Returns:
        The config as it is and None where nothing is planned (`is_planned`).

    Raises:
        UserError: train.vram is not a size, or no plan fits; the message names the smallest change that
            would.
    """
    if not is_planned(config, device, processes):
        return config, None
    wanted = None if config.train.vram is None else parse_size(config.train.vram, "train.vram")
    if device.type == "cuda":
        rules, free = gpu.choose_rules(device), gpu.available(device)
    else:
        assert wanted is not None
        rules, free = gpu.planned_rules(), wanted
    free = int(processes.smallest(free))
    shortage = ""
    if wanted is None or free < wanted:
        vram, source = free, "the card's free memory"
        shortage = _held(device) if wanted is None else _shortage(wanted, free, device)
    else:
        vram, source = wanted, "train.vram"
    if recorded is not None:
        config = with_settings(config, _open(config, recorded), "resumed run")

    def choose() -> tuple[Plan, Plan | None, str]:
        outcome = plan_run(config, model(), vram, device, processes.local_size, rules)
        if outcome.chosen is None:
            raise UserError("; ".join(filter(None, [refusal(outcome, source), shortage])))
        return outcome.chosen, _smaller(outcome, outcome.chosen), outcome.card.rates.source

    chosen, smaller, rates = processes.once(choose)
    if shortage and wanted is None:
        shortage += _whole_card(config, device, chosen)
    return chosen.apply(config), Budget(device, vram, chosen, smaller, rates, source, shortage)


def _open(config: Config, recorded: dict[str, Any]) -> dict[str, Any]:
    """Settings that the config leaves to the planner and that the resumed run must keep, with its values."""
    known = {f"{section}.{key}": value for section, part in recorded.items() for key, value in part.items()}
    left_open = set(kept_at_resume()) - config.stated
    return {name: known[name] for name in sorted(left_open & known.keys())}  # settings may be newer


def _smaller(outcome: PlanResult, chosen: Plan) -> Plan | None:
    host = outcome.host
    others = [
        plan
        for plan, _ in outcome.others
        if plan.reserved < 0.95 * chosen.reserved and plan.pinned <= host.pinnable and plan.host <= host.ram
    ]
    return min(others, key=lambda plan: plan.ms, default=None)


def _held(device: torch.device) -> str:
    """Which other programs hold the card's memory; empty where none does or it is unknown."""
    if device.type != "cuda":
        return ""
    local = of_uuid(gpus(), str(torch.cuda.get_device_properties(device).uuid))
    return "" if local is None else held_text(local)


def _whole_card(config: Config, device: torch.device, chosen: Plan) -> str:
    """What to do about other programs: the plan for the whole card, if it is known and differs."""
    name, total = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    whole = None
    with suppress(UserError):  # a card that the table does not have
        card = find_card(f"{name} {total / GIB:.0f}GB")
        found = shipped.find(config, card, int(card.gib * GIB), host(parse_size(RAM, "ram")))
        whole = None if found is None else found.chosen
    if whole is None:
        return ": close it, and a faster plan may fit"
    if whole.settings == chosen.settings:
        return ": this run is planned as on a free card"
    return f": close it for {whole.name} ({whole.time}), or go on with this plan, which fits"


def _shortage(wanted: int, free: int, device: torch.device) -> str:
    """Why a run gets less than train.vram."""
    asked, available = f"train.vram = {wanted / GIB:.2f} GiB", f"{free / GIB:.2f} GiB"
    total = torch.cuda.get_device_properties(device).total_memory
    if wanted > total:
        return f"{asked} is more than the card's {total / GIB:.2f} GiB: the run has what is free, {available}"
    held = _held(device) or "other programs hold the rest (nvidia-smi lists them)"
    return f"{asked} is more than the {available} that are free: {held}, and the run has what is free"
