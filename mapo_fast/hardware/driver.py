"""NVIDIA's driver: whether it is there, and why torch sees no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

_OLDEST_DRIVERS = {11: ("450.80.02", "452.39"), 12: ("525.60.13", "528.33"), 13: ("580.65.06", "580.88")}
"""Oldest driver for each major version of CUDA, on Linux and on Windows; it runs every minor version (NVIDIA,
CUDA Compatibility, minor version compatibility; release notes, table 3)."""


def why_no_gpu() -> str:
    """Why torch sees no NVIDIA GPU, and what to do."""
    found, wants = driver(), _wanted_driver()
    if torch.version.hip is not None:
        return "this torch is a ROCm build"
    if torch.version.cuda is None:
        if found:
            needed = "install a CUDA build (pytorch.org)"
            return f"NVIDIA driver {found} is here, but this torch is a CPU build: {needed}"
        return "no NVIDIA driver found, and this torch is a CPU build"
    build = f"this torch (CUDA {torch.version.cuda})"
    if found is None:
        return f"no NVIDIA driver found; {build} wants driver {wants} or newer"
    if _numbers(found) < _numbers(wants):
        return f"NVIDIA driver {found} is too old: {build} wants {wants} or newer; update it"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "torch sees no device" if hidden is None else f"CUDA_VISIBLE_DEVICES = {hidden!r} hides it"


def _wanted_driver() -> str:
    """The oldest driver for this torch's CUDA; for an unknown CUDA version, that of the newest known one."""
    major = int((torch.version.cuda or "0").partition(".")[0])
    return _OLDEST_DRIVERS.get(major, _OLDEST_DRIVERS[max(_OLDEST_DRIVERS)])[sys.platform == "win32"]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    program = shutil.which("nvidia-smi")
    if program is None or Path(program).absolute().parent == Path.cwd():  # Windows looks there first
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None
