"""Settings that affect speed, each flipped from the engine's plan."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from bench.providers.base import BOTH
from bench.providers.engine import MapoFast, plan
from bench.providers.task import Task
from mapo_fast.settings.schema import SpeedConfig
from mapo_kernels.fp8 import in_fp8


class Switch(NamedTuple):
    """One setting."""

    label: str
    changes: Mapping[str, Any]
    """By `section.key`."""
    kinds: tuple[str, ...] = BOTH
    """Kinds of training that the switch applies to."""
    gpu: bool = True
    """Whether the switch needs an NVIDIA GPU."""
    package: str = "torch"
    """Package that has to be installed."""
    benchmark: bool = False
    """Whether cuDNN times its algorithms for each new shape first, which the engine never enables."""

    @property
    def provider(self) -> str:
        """Name of the engine with the switch set."""
        return f"{MapoFast.name}, {self.label}"

    def suits(self, task: Task) -> bool:
        """Whether the switch can be set for this task and differs from the plan."""
        device = task.device
        if task.kind not in self.kinds or (self.gpu and device.type != "cuda") or not find_spec(self.package):
            return False
        if "fp8" in self.label and not in_fp8(device):
            return False
        return self.benchmark or self.changes != self.planned(task)

    def planned(self, task: Task) -> dict[str, Any]:
        """The plan's values of the settings that the switch changes."""
        config = plan(task, {})
        names = {name: name.split(".") for name in self.changes}
        return {name: getattr(getattr(config, section), key) for name, (section, key) in names.items()}


_ANYWHERE = ("fused_ops", "channels_last", "prefetch", "compile")
"""Switches of `[speed]` that work on the CPU too."""


def _speed(name: str, on: bool) -> Switch:
    kinds = ("full",) if name == "fp8" else BOTH  # a LoRA's frozen base is stored in fp8 instead
    return Switch(f"{name} {'on' if on else 'off'}", {f"speed.{name}": on}, kinds, name not in _ANYWHERE)


_SPEED = [name for name, value in SpeedConfig().model_dump().items() if isinstance(value, bool)]
SWITCHES: tuple[Switch, ...] = (
    *(_speed(name, on) for name in _SPEED for on in (True, False)),
    Switch("attention xformers", {"train.attention": "xformers"}, package="xformers"),
    Switch("attention flash", {"train.attention": "flash"}, package="flash_attn"),
    Switch("step after backward", {"train.fused_step": False}, ("full",)),
    Switch("fp32 masters", {"train.precision": "bf16"}, ("full",)),
    Switch("cudnn benchmark on", {}, benchmark=True),
    Switch("fp8 base", {"adapter.base": "fp8"}, ("lora",)),
)


def switched(switch: Switch) -> type[MapoFast]:
    """The engine with a switch set."""

    class Switched(MapoFast):
        name = switch.provider
        kinds = switch.kinds
        changes = switch.changes

        def __init__(self, task: Task) -> None:
            torch.backends.cudnn.benchmark = switch.benchmark
            super().__init__(task)

    return Switched
