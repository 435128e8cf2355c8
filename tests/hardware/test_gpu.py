"""The GPU's memory as a run finds it, on a card that is pretended."""

from __future__ import annotations

import platform
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mapo_fast.hardware import gpu
from mapo_fast.hardware.allocator import EXPANDABLE, MIB, Rules
from mapo_fast.util.errors import UserError
from tests.run.test_budget import CPU, CUDA, GIB, PretendedCard


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocator has been told; the user has told it nothing."""
    told: list[str] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: told[-1] if told else "")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(gpu.sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(gpu, "_try", lambda device: None)
    return told


def test_expandable_segments_are_switched_on_where_they_exist(settings: list[str]) -> None:
    assert gpu.choose_rules(CUDA) == gpu.planned_rules() == EXPANDABLE
    assert settings == ["expandable_segments:True"]
    assert gpu.choose_rules(CUDA) == EXPANDABLE
    assert len(settings) == 1


def test_a_torch_that_does_not_tell_its_settings_is_told_ours(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    assert gpu.choose_rules(CUDA) == EXPANDABLE
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize(
    ("system", "release"), [("win32", "10"), ("linux", "5.15.167.4-microsoft-standard-WSL2")]
)
def test_windows_and_wsl_are_planned_for_without_them(
    settings: list[str], system: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert gpu.choose_rules(CUDA) == gpu.planned_rules() == Rules()
    assert not settings


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("expandable_segments:False", Rules()),
        ("expandable_segments:True", EXPANDABLE),
        ("max_split_size_mb:128, garbage_collection_threshold:0.8", Rules(max_split=128 * MIB)),
        ("roundup_power2_divisions:8", Rules(divisions=8)),
        ("roundup_power2_divisions:[256:8,512:4,>:2],expandable_segments:True", Rules(True, None, 2)),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", Rules(divisions=2)),
        ("roundup_power2_divisions:[256:0,>:1]", Rules()),
        ("large_segment_size_mb:64", Rules(segment=64 * MIB)),
        (
            "max_split_size_mb:128,max_non_split_rounding_mb:40",
            Rules(max_split=128 * MIB, rounding=40 * MIB),
        ),
    ],
)
def test_a_users_own_settings_are_kept_and_planned_for(
    settings: list[str], name: str, text: str, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    assert gpu.choose_rules(CUDA) == gpu.planned_rules() == rules
    assert not settings


@pytest.mark.parametrize(
    "error", [RuntimeError("INTERNAL ASSERT FAILED\nat:"), ValueError("Expected 'True'")]
)
def test_settings_that_torch_cannot_read_are_named(
    settings: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise error

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:true")
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", refuse)
    with pytest.raises(UserError, match=r"PYTORCH_ALLOC_CONF = 'expandable_segments:true'") as info:
        gpu.planned_rules()
    assert str(error).splitlines()[0] in str(info.value)
    assert "\n" not in str(info.value)


def test_a_driver_that_refuses_them_gets_the_usual_segments(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA driver error: unknown error")

    monkeypatch.setattr(gpu, "_try", refuse)
    assert gpu.choose_rules(CUDA) == Rules()
    assert settings[-1] == "expandable_segments:False"


def test_the_libraries_of_a_step_are_loaded_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: cleared.append("waited"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cache"))
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: cleared.append("workspaces"), raising=False)
    with torch.no_grad(), torch.profiler.profile() as profile:
        gpu.load_libraries(CPU)
    names = " ".join(event.key for event in profile.key_averages())
    for needed in ("aten::convolution_backward", "aten::mm", "attention_for_cpu_backward"):
        assert needed in names
    assert cleared == ["waited", "workspaces", "cache"]


def test_free_memory_is_read_after_the_libraries_have_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedCard(monkeypatch, free=11.2, reserved=0)

    def load(device: torch.device) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(10.9 * GIB), 12 * GIB))

    monkeypatch.setattr(gpu, "load_libraries", load)
    assert gpu.available(CUDA) == pytest.approx(11.3 * GIB, abs=2)


def test_a_card_without_free_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedCard(monkeypatch, free=0.1, reserved=0)

    def fail(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(gpu, "load_libraries", fail)
    with pytest.raises(UserError, match=r"no memory free: other programs hold it \(nvidia-smi lists them\)"):
        gpu.available(CUDA)


@pytest.mark.parametrize(
    ("system", "answer", "expected"),
    [
        ("linux", "Enabled\n", True),
        ("linux", "Disabled\n", False),
        ("linux", None, False),
        ("win32", None, True),
    ],
)
def test_a_display_is_found(
    system: str, answer: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        if answer is None:
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(gpu.sys, "platform", system)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu.subprocess, "run", run)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu.drives_display(CUDA) is expected
    assert all("--id=GPU-12-34" in command for command in asked)


def test_a_desktop_keeps_half_a_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedCard(monkeypatch, free=11, reserved=1.0, display=True)
    assert gpu.available(CUDA) == pytest.approx((11 + 1 + 0.4 - 0.5) * GIB, abs=2)


@pytest.mark.parametrize(("asked", "expected"), [(None, 11.0), (6 * GIB, 5.6), (20 * GIB, 11.0)])
def test_a_cap_is_what_is_free_or_what_is_asked_for_beside_the_context(
    asked: int | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = PretendedCard(monkeypatch, free=11, reserved=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with gpu.capped(asked):
        assert card.caps == [(pytest.approx(expected / 24), 0)]
    assert card.caps[1:] == [(1.0, 0)]
