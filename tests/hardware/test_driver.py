"""Why torch sees no GPU."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from mapo_fast.hardware import driver as module


@pytest.mark.parametrize(
    ("cuda", "found", "why"),
    [
        (None, "550.54", "NVIDIA driver 550.54 is here, but this torch is a CPU build"),
        (None, None, "no NVIDIA driver found, and this torch is a CPU build"),
        (
            "12.8",
            None,
            r"no NVIDIA driver found; this torch \(CUDA 12\.8\) wants driver 525\.60\.13 or newer",
        ),
        (
            "12.8",
            "470.82.01",
            r"driver 470\.82\.01 is too old: this torch \(CUDA 12\.8\) wants 525\.60\.13 or",
        ),
        ("13.0", "575.51", r"driver 575\.51 is too old: this torch \(CUDA 13\.0\) wants 580\.65\.06"),
        ("14.1", "575.51", "too old"),
        ("12.8", "525.60.13", "hides it"),
    ],
)
def test_why_torch_sees_no_gpu(
    cuda: str | None, found: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(module, "driver", lambda: found)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert re.search(why, module.why_no_gpu())
