"""What a run starts with besides its settings, for its log: command, device, planned memory, versions."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mapo_fast.run.budget import Budget

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")


def start_facts(device: torch.device, budget: Budget | None) -> dict[str, Any]:
    """The facts, as they go into the log's `start` entry.

    `command` is there for a run of the command line alone, the planned figures where memory was planned.
    """
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version(), **_versions()},
    }
    program = Path(sys.argv[0])
    if program.stem == "mapo-fast" or program.parts[-2:] == ("mapo_fast", "__main__.py"):
        facts["command"] = ["mapo-fast", *sys.argv[1:]]
    if budget is not None:
        facts |= {
            "planned_memory_mib": round(budget.plan.peak / 2**20, 1),
            "planned_reserved_mib": round(budget.plan.reserved / 2**20, 1),
            "planned_ms": round(budget.plan.ms, 1),
        }
    return facts


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
