"""System RAM of a run: pinned memory, and the peak of loading, training and saving."""

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


def in_wsl() -> bool:
    """Whether this Linux runs inside Windows."""
    return "microsoft" in platform.release().lower()


class Host(NamedTuple):
    """Memory that a run can have on a machine, in bytes."""

    ram: int
    pinnable: int


def host(ram: int | None, processes: int = 1) -> Host:
    """Memory for each of several processes on this machine, or on another with this much free RAM.

    Memory of other programs is not available; memory that this process already holds is. Linux lets most
    memory be pinned; Windows and WSL half of it.
    """
    own = 0
    if ram is None:
        ram = min([psutil.virtual_memory().available, *_container_rooms(Path("/"))])
        own = psutil.Process().memory_info().rss
    ram = ram // processes + own
    return Host(ram, int(ram * (0.5 if sys.platform == "win32" or in_wsl() else 0.8)))


def _container_rooms(root: Path) -> list[int]:
    """Bytes that the control groups (v2, v1) of this process have left; a group without a limit is left out.

    Cached files that a group can drop count as free. Where a container sees only its own group, the path that
    the kernel names does not exist, and the top group is read.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names, used = root / "sys/fs/cgroup", ["memory.max", "memory.high"], "memory.current"
            droppable = "inactive_file"
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ["memory.limit_in_bytes"]
            used, droppable = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                limits = [limit for name in names if (limit := _number(folder / name)) is not None]
                held = (_number(folder / used) or 0) - _statistic(folder / "memory.stat", droppable)
                rooms += [max(0, limit - max(0, held)) for limit in limits]
    return rooms


def _statistic(file: Path, name: str) -> int:
    """A value from a group's statistics, 0 where there is none."""
    try:
        found = dict(line.split() for line in file.read_text().splitlines())
        return int(found.get(name, 0))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    """The number in a file; None for "max", and where there is no such file."""
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
