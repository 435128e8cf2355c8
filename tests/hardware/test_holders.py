"""Who holds a GPU's memory, from a fake NVML: names of programs, amounts, and where nobody can say."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mapo_fast.hardware import holders
from mapo_fast.hardware.holders import Gpu, Holder, gpus, held_text, of_uuid, program
from mapo_fast.util.sizes import GIB


class FakeNvml:
    """The part of `pynvml` that is asked."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes: dict[int, int | None], *, driver: bool = True) -> None:
        self.processes, self.driver = processes, driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"NVIDIA GeForce RTX 3060"

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return "GPU-12-34"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=12 * GIB, free=5 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in self.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        raise self.NVMLError


def test_holders_are_named_largest_first_without_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml({os.getpid(): GIB, 5: GIB // 2, 7: int(6.9 * GIB), 9: 1})
    monkeypatch.setattr(holders, "_nvml", lambda: fake)
    monkeypatch.setattr(holders, "program", {5: "firefox", 7: "python (ComfyUI)", 9: "dwm"}.__getitem__)
    (gpu,) = gpus()
    assert (gpu.name, gpu.total, gpu.free) == ("NVIDIA GeForce RTX 3060", 12 * GIB, 5 * GIB)
    assert held_text(gpu) == "python (ComfyUI) holds 6.9 of 12.0 GiB, firefox holds 0.5 GiB"
    assert of_uuid([gpu], "12-34") is gpu
    assert of_uuid([gpu], "56") is None


def test_where_the_driver_says_no_amount_the_program_is_named() -> None:
    gpu = Gpu("RTX 3060", "GPU-1", 12 * GIB, 5 * GIB, [Holder("python (ComfyUI)", None)])
    assert held_text(gpu) == "python (ComfyUI) uses the GPU"
    assert held_text(gpu._replace(holders=[])) == ""


@pytest.mark.parametrize("nvml", [None, FakeNvml({}, driver=False)], ids=["no package", "no driver"])
def test_without_nvml_there_is_no_gpu_and_no_error(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> None:
    monkeypatch.setattr(holders, "_nvml", lambda: nvml)
    assert gpus() == []


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("python3.11", ["/home/a/ComfyUI/main.py", "--listen"], "python (ComfyUI)"),
        ("python", ["main.py"], "python (here)"),
        ("python", ["-s", "train_network.py"], "python (train_network)"),
        ("python", ["-m", "mapo_fast", "train"], "python (mapo_fast)"),
        ("python", [], "python"),
        ("firefox", ["--headless"], "firefox"),
    ],
)
def test_a_process_is_named_by_its_program_and_script(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str], expected: str
) -> None:
    process = SimpleNamespace(
        name=lambda: name, cmdline=lambda: ["interpreter", *arguments], cwd=lambda: "/home/a/here"
    )
    monkeypatch.setattr(psutil, "Process", lambda pid: process)
    assert program(3) == expected


def test_a_process_that_cannot_be_looked_at_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", denied)
    assert program(77) == "process 77"
