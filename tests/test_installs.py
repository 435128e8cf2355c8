"""What each install gives: the base the loss, diffusers in addition `patch_unet`; neither needs more."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.installed import ROOT, install, run

BASE = ("torch", "safetensors", *(["triton"] if find_spec("triton") else []))


@pytest.mark.slow
def test_the_base_install_gives_the_loss(tmp_path: Path) -> None:
    install(tmp_path, *BASE)
    assert "MaPOLoss runs from" in run(tmp_path, ROOT / "tests" / "base_install.py")


@pytest.mark.slow
def test_diffusers_beside_it_gives_patch_unet(tmp_path: Path) -> None:
    install(tmp_path, *BASE, "diffusers")
    assert "patch_unet runs from" in run(tmp_path, ROOT / "tests" / "base_and_diffusers.py")
