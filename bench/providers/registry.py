"""All providers by name."""

from __future__ import annotations

from bench.providers.base import Provider
from bench.providers.diffusers_loop import CompiledDiffusersLoop, DiffusersLoop
from bench.providers.dpo import DpoFull, DpoLora
from bench.providers.engine import MapoFast
from bench.providers.released import Released
from bench.providers.switches import SWITCHES, switched
from bench.providers.task import Task

PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        MapoFast,
        *map(switched, SWITCHES),
        Released,
        DiffusersLoop,
        CompiledDiffusersLoop,
        DpoLora,
        DpoFull,
    )
}
COMPILED = (CompiledDiffusersLoop.name, f"{MapoFast.name}, compile on")


def names_for(task: Task) -> list[str]:
    """The providers that suit a task, and the engine with each switch flipped.

    Nothing is compiled at tiny size: that takes longer than it can gain.
    """
    left_out = {switch.provider for switch in SWITCHES if not switch.suits(task)}
    left_out |= {name for name, provider in PROVIDERS.items() if task.kind not in provider.kinds}
    if task.size == "tiny":
        left_out.update(COMPILED)
    return [name for name in PROVIDERS if name not in left_out]
