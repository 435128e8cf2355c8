"""The flash-attn package's place in the UNet, taken by torch's attention in the package's layout."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapo_fast import patch_unet
from mapo_fast.engine.flash import FlashProcessor, use_flash
from mapo_fast.util.errors import UserError
from tests.unets import make_unet, run


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, tokens, heads, C / heads), as the package has it."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
def test_it_is_the_same_attention(monkeypatch: pytest.MonkeyPatch, patched: bool) -> None:
    unet = make_unet("sdxl")
    wanted = run(unet, "sdxl", torch.float64)
    if patched:
        patch_unet(unet)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    use_flash(unet)
    processors: Any = unet.attn_processors.values()
    assert all(isinstance(p, FlashProcessor) for p in processors)
    found = run(unet, "sdxl", torch.float64)
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert (found[name] - expected).norm() <= 1e-10 * expected.norm(), name


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=r"needs the flash-attn package \(.*\); use 'sdpa'") as caught:
        use_flash(make_unet("sdxl"))
    assert "\n" not in str(caught.value)
