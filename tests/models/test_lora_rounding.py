"""Merged weights are rounded once; what a LoRA file says twice, or a file next to it, is not misread."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models.lora import add_lora, save_lora
from mapo_fast.models.lora_file import read_lora
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.stored import rounded
from mapo_fast.util.errors import UserError


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Pipeline:
    return open_sdxl(tiny_sdxl)


@pytest.fixture
def kohya(model: Pipeline, tmp_path: Path) -> Path:
    unet = model.load_unet()
    add_lora(unet, rank=3, alpha=2.0, targets=("to_q", "conv1"), seed=1)
    save_lora(unet, tmp_path / "lora")
    return tmp_path / "lora" / "lora_kohya.safetensors"


def test_rounding_to_fp16_is_numpys() -> None:
    values = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near_ties = (1 + 2**-11) * (1 + torch.arange(-500, 500).double() * 2.0**-44)
    odd = torch.tensor(
        [0.0, -0.0, 65519.9999999, 65520.0, 1e-8, 2**-25, 1e300, math.inf, -math.inf, math.nan]
    )
    values = torch.cat([values, -near_ties, near_ties, odd.double(), values * 1e-5])
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    assert np.array_equal(rounded(values, torch.float16).numpy(), expected, equal_nan=True)
    assert not np.array_equal(values.half().numpy(), expected, equal_nan=True)  # torch rounds twice


def test_rounding_to_bf16_sees_what_fp32_cannot_hold() -> None:
    above = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert rounded(above, torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize("name", ["to_k", "attn2.to_k", r"attn2\.to_k", ".*attn2.to_k"])
def test_peft_reads_its_patterns_and_so_do_we(model: Pipeline, tmp_path: Path, name: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=5.0,
        target_modules=["to_q", "attn2.to_k", "conv1"],
        alpha_pattern={name: 7.0},
        use_rslora=True,
    )
    adapted = get_peft_model(model.load_unet(), config)
    adapted.save_pretrained(tmp_path)
    modules = dict(adapted.base_model.model.named_modules())
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        layers = read_lora(path, model.parts).parts["unet"]
        assert layers.keys() == {name for name, module in modules.items() if hasattr(module, "lora_A")}
        for layer, factors in layers.items():
            assert factors.scale == pytest.approx(modules[layer].scaling["default"]), layer
    assert re.search("no adapter_config.json with its alpha is next to it", _without_config(tmp_path, model))


def _without_config(folder: Path, model: Pipeline) -> str:
    (folder / "adapter_config.json").unlink()
    return refusal(folder, model)


def test_a_factor_under_two_names_is_refused(model: Pipeline, kohya: Path) -> None:
    state = load_file(kohya)
    layer = next(iter(read_lora(kohya, model.parts).parts["unet"]))
    state[f"unet.{layer}.lora_A.weight"] = torch.zeros(3, 3)
    save_file(state, kohya)
    assert "twice" in refusal(kohya, model)


def test_any_damage_to_the_header_is_one_line(model: Pipeline, kohya: Path) -> None:
    whole = kohya.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    said = []
    for place in [*range(12), *range(12, length, 509)]:
        for value in (0, 0x22, 0x39, 0xFF):
            kohya.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                read_lora(kohya, model.parts)
            except UserError as error:
                said.append(str(error))
    for cut in (0, 7, 8, 100, length, len(whole) - 1):
        kohya.write_bytes(whole[:cut])
        said.append(refusal(kohya, model))
    assert len(said) > 50
    assert not any("\n" in one for one in said)


def refusal(path: Path, model: Pipeline) -> str:
    with pytest.raises(UserError) as caught:
        read_lora(path, model.parts)
    return str(caught.value)
