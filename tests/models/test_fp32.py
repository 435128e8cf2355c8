"""TF32 is off where fp32 is meant, whichever interface of torch switched it on, and on again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mapo_fast.models.fp32 import exact_fp32

BACKENDS: Any = torch.backends


def old() -> None:
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")


def old_off() -> None:
    BACKENDS.cudnn.allow_tf32 = False
    BACKENDS.cuda.matmul.allow_tf32 = False


def new() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "tf32"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def new_off() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


def everything() -> None:
    BACKENDS.fp32_precision = "tf32"


def state() -> list[Any]:
    """What every switch says; None where torch refuses to say."""
    found = []
    for read in (
        lambda: BACKENDS.fp32_precision,
        lambda: BACKENDS.cudnn.conv.fp32_precision,
        lambda: BACKENDS.cudnn.rnn.fp32_precision,
        lambda: BACKENDS.cuda.matmul.fp32_precision,
        lambda: BACKENDS.cudnn.allow_tf32,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    yield
    BACKENDS.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for switch, value in ((BACKENDS.cudnn.conv, "tf32"), (BACKENDS.cudnn.rnn, "tf32")):
        switch.fp32_precision = value
    BACKENDS.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("setting", [lambda: None, old, old_off, new, new_off, everything])
def test_tf32_is_off_and_then_as_it_was(setting: Callable[[], None]) -> None:
    setting()
    before = state()
    with exact_fp32():
        assert BACKENDS.cudnn.conv.fp32_precision == BACKENDS.cuda.matmul.fp32_precision == "ieee"
        assert BACKENDS.cudnn.allow_tf32 is False, "torch can be asked by either name"
        assert BACKENDS.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"
    assert state() == before
