"""All providers by name."""

from __future__ import annotations

from bench.providers.base import Provider
from bench.providers.diffusers_loop import CompiledDiffusersLoop, DiffusersLoop
from bench.providers.dpo import DpoFull, DpoLora
from bench.providers.engine import MapoFast, switch_defaults
from bench.providers.released import Released
from bench.providers.task import Task


def _switched(switch: str, on: bool) -> type[MapoFast]:
    """The engine with one switch of `[speed]` the other way."""

    class Switched(MapoFast):
        name = f"mapo_fast, {switch} {'on' if on else 'off'}"

        def __init__(self, task: Task) -> None:
            super().__init__(task, {switch: on})

    return Switched


_SWITCHES = [_switched(name, not default) for name, default in switch_defaults().items()]

PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (MapoFast, *_SWITCHES, Released, DiffusersLoop, CompiledDiffusersLoop, DpoLora, DpoFull)
}


def names_for(task: Task) -> list[str]:
    """The providers that suit a task: compiling the tiny UNet takes longer than it can gain."""
    other = DpoFull if task.kind == "lora" else DpoLora
    left_out = {other.name} | ({CompiledDiffusersLoop.name} if task.size == "tiny" else set())
    return [name for name in PROVIDERS if name not in left_out]
