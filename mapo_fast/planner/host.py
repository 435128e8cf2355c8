"""System RAM of a run: what is pinned, and the highest point of loading, training and saving."""

from __future__ import annotations

import platform
import sys
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


def host(ram: int | None) -> Host:
    """This machine's limits, or those of another with this much RAM.

    Linux lets most memory be pinned; Windows and WSL half of it.
    """
    ram = psutil.virtual_memory().total if ram is None else ram
    wsl = "microsoft" in platform.release().lower()
    return Host(ram, int(ram * (0.5 if sys.platform == "win32" or wsl else 0.8)))


def highest(pinned: int, loaded: int) -> int:
    """Most host bytes of a run.

    Args:
        pinned: bytes in pinned memory while training.
        loaded: bytes of the UNet as it is loaded on the CPU, before it goes to the device or to pinned memory
            piece by piece.
    """
    return PROCESS_BYTES + max(loaded, pinned) + TENSOR_BYTES
