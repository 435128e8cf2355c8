"""Which programs hold the memory of this machine's NVIDIA GPUs, by NVML and without torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePath
from typing import Any, NamedTuple

from mapo_fast.util.sizes import GIB

_TELLING_NOTHING = {"main", "launch", "app", "run", "server", "webui", "start", "__main__"}
"""Script names that say nothing; such scripts are named by their folder."""


class Holder(NamedTuple):
    """Another process that holds memory of a GPU."""

    name: str
    """Name of its program, and of the script that a Python runs: "python (ComfyUI)"."""
    nbytes: int | None
    """Bytes held; None where the driver does not tell, as under Windows."""


class Gpu(NamedTuple):
    """An NVIDIA GPU of this machine."""

    name: str
    uuid: str
    total: int
    free: int
    holders: list[Holder]
    """Largest first."""


def gpus() -> list[Gpu]:
    """This machine's GPUs; none where NVML cannot be asked."""
    nvml = _nvml()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver
        return []
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return [_gpu(nvml, handle) for handle in handles]
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _nvml() -> Any:
    """NVIDIA's package `nvidia-ml-py`, which is optional."""
    with suppress(ImportError):
        return importlib.import_module("pynvml")
    return None


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    used: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(nvml.NVMLError):
            used |= {process.pid: process.usedGpuMemory for process in ask(handle)}
    used.pop(os.getpid(), None)
    found = [Holder(program(pid), nbytes) for pid, nbytes in used.items()]
    return Gpu(
        _text(nvml.nvmlDeviceGetName(handle)),
        _text(nvml.nvmlDeviceGetUUID(handle)),
        memory.total,
        memory.free,
        sorted(found, key=lambda holder: -(holder.nbytes or 0)),
    )


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def program(pid: int) -> str:
    """The name of a process, and of the script or module that a Python runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        name, arguments = process.name(), process.cmdline()[1:]
    except (psutil.Error, OSError):  # another user's, or ended
        return f"process {pid}"
    if not name.lower().startswith("python"):
        return str(name)
    script = next((text for text in arguments if text.endswith(".py")), None)
    if script is None:
        return f"python ({arguments[1]})" if arguments[:1] == ["-m"] and len(arguments) > 1 else "python"
    path = PurePath(script)
    with suppress(psutil.Error, OSError):
        path = PurePath(process.cwd()) / path
    return f"python ({path.parent.name if path.stem in _TELLING_NOTHING and path.parent.name else path.stem})"


def held_text(gpu: Gpu) -> str:
    """Which program holds how much, such as "python (ComfyUI) holds 6.9 of 12.0 GiB"; empty without one."""
    known = [holder for holder in gpu.holders if holder.nbytes is None or holder.nbytes > 0.1 * GIB]
    if not known:
        return ""
    parts = [_part(holder, gpu.total if i == 0 else None) for i, holder in enumerate(known[:3])]
    return ", ".join(parts)


def _part(holder: Holder, total: int | None) -> str:
    if holder.nbytes is None:
        return f"{holder.name} uses the GPU"
    of = "" if total is None else f" of {total / GIB:.1f}"
    return f"{holder.name} holds {holder.nbytes / GIB:.1f}{of} GiB"


def of_uuid(found: Iterable[Gpu], uuid: str) -> Gpu | None:
    """The GPU with torch's UUID."""
    return next((gpu for gpu in found if uuid in gpu.uuid), None)
