"""All providers by name."""

from __future__ import annotations

from bench.providers.base import Provider
from bench.providers.diffusers_loop import CompiledDiffusersLoop, DiffusersLoop
from bench.providers.dpo import DpoFull, DpoLora
from bench.providers.engine import SWITCHES, Fp8Base, MapoFast, plan
from bench.providers.released import Released
from bench.providers.task import Task
from mapo_kernels._fp8 import in_fp8


def _switched(switch: str, on: bool) -> type[MapoFast]:
    """The engine with one switch of `[speed]` set."""

    class Switched(MapoFast):
        name = switched_name(switch, on)

        def __init__(self, task: Task) -> None:
            super().__init__(task, {switch: on})

    return Switched


def switched_name(switch: str, on: bool) -> str:
    """Name of the engine with one switch set."""
    return f"mapo_fast, {switch} {'on' if on else 'off'}"


_SWITCHED = [_switched(name, on) for name in SWITCHES for on in (True, False)]

PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        MapoFast,
        *_SWITCHED,
        Fp8Base,
        Released,
        DiffusersLoop,
        CompiledDiffusersLoop,
        DpoLora,
        DpoFull,
    )
}


def names_for(task: Task) -> list[str]:
    """The providers that suit a task: of each switch the value that the plan has not. fp8 where a GPU has it,
    which a LoRA multiplies its frozen base in.

    Nothing is compiled at tiny size: that takes longer than it can gain.
    """
    speed = plan(task, {}).speed.model_dump()
    left_out = {switched_name(name, speed[name]) for name in SWITCHES}
    left_out.add((DpoFull if task.kind == "lora" else DpoLora).name)
    if task.size == "tiny":
        left_out |= {CompiledDiffusersLoop.name, switched_name("compile", True)}
    here = in_fp8(task.device)
    left_out |= {
        name
        for kind, name in (("full", switched_name("fp8", True)), ("lora", Fp8Base.name))
        if task.kind != kind or not here
    }
    if task.device.type == "cpu":
        left_out.add(switched_name("cuda_graph", True))
    return [name for name in PROVIDERS if name not in left_out]
