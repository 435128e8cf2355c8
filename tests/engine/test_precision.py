"""Which precision is chosen where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mapo_fast.engine.precision import choose_device, choose_precision
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config, TrainConfig
from mapo_fast.util.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _config(precision: str, kind: str) -> Config:
    return parse_config(
        {
            "model": {"path": "m"},
            "data": {"cache": "c"},
            "train": {"output": "o", "precision": precision},
            "adapter": {"kind": kind},
        }
    )


@pytest.mark.parametrize(
    ("precision", "kind", "base", "trainable", "autocast"),
    [
        ("fp32", "full", torch.float32, torch.float32, None),
        ("bf16", "full", torch.float32, torch.float32, torch.bfloat16),
        ("bf16", "lora", torch.bfloat16, torch.float32, torch.bfloat16),
        ("pure_bf16", "full", torch.bfloat16, torch.bfloat16, None),
        ("pure_bf16", "lora", torch.bfloat16, torch.bfloat16, None),
    ],
)
def test_storage_and_arithmetic(
    precision: str, kind: str, base: torch.dtype, trainable: torch.dtype, autocast: torch.dtype | None
) -> None:
    chosen = choose_precision(_config(precision, kind), CPU)
    assert (chosen.base, chosen.trainable, chosen.autocast, chosen.scaled) == (
        base,
        trainable,
        autocast,
        False,
    )


def test_autocast_keeps_no_copies_of_the_weights() -> None:
    """Autocast's cache would add 4.4 GiB of a full SDXL to the gradients of earlier micro-batches."""
    with choose_precision(_config("bf16", "full"), CPU).context(CPU):
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()


def test_a_card_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        UserError, match=r"Tesla T4 cannot do bf16.*'fp32', or adapter\.kind = 'lora'.*'fp16'"
    ):
        choose_precision(_config("bf16", "full"), CUDA)
    with pytest.raises(UserError, match="use 'fp16'"):
        choose_precision(_config("bf16", "lora"), CUDA)
    chosen = choose_precision(_config("fp16", "lora"), CUDA)
    assert chosen.scaled
    assert (chosen.base, chosen.trainable) == (torch.float16, torch.float32)
    assert not choose_precision(_config("fp32", "full"), CUDA).scaled


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        choose_precision(_config("fp16", "lora"), CPU)


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        choose_device(TrainConfig(output=Path("o"), device="cuda"))
    assert choose_device(TrainConfig(output=Path("o"))).type == "cpu"
