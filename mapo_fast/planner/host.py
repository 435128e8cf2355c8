"""System RAM of a run: what is pinned, and the highest point of loading, training and saving."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

PROCESS_BYTES = 3 * 2**30
"""Python, torch, the CUDA libraries and the data of a run; assumed."""
TENSOR_BYTES = 128 * 2**20
"""The largest tensor: saving brings one at a time to the host."""


class Host(NamedTuple):
    """Limits of a machine, in bytes."""

    ram: int
    pinnable: int


def host(ram: int | None, processes: int = 1) -> Host:
    """This machine's limits, or those of another with this much RAM, for each of some processes on it.

    Linux lets most memory be pinned; Windows and WSL half of it.
    """
    if ram is None:
        ram = min([psutil.virtual_memory().total, *_container_limits(Path("/"))])
    ram //= processes
    wsl = "microsoft" in platform.release().lower()
    return Host(ram, int(ram * (0.5 if sys.platform == "win32" or wsl else 0.8)))


def _container_limits(root: Path) -> list[int]:
    """Memory limits of the control groups (v2, v1) that this process is in; one that has none is left out.

    Where a container sees only its own group, the path that the kernel names is not there: the top is.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ["memory.limit_in_bytes"]
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                limits += [limit for name in names if (limit := _limit(folder / name)) is not None]
    return limits


def _limit(file: Path) -> int | None:
    """None for "max", and where there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def highest(pinned: int, loaded: int) -> int:
    """Most host bytes of a run.

    Args:
        pinned: bytes in pinned memory while training.
        loaded: bytes of the UNet as it is loaded on the CPU, before it goes to the device or to pinned memory
            piece by piece.
    """
    return PROCESS_BYTES + max(loaded, pinned) + TENSOR_BYTES
