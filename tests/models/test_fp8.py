"""`speed.fp8`: which layers, that the layouts and switches agree under it, and who is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_fast.engine.build import prepare_unet
from mapo_fast.models.fp8 import Fp8Linear, use_fp8
from mapo_fast.models.patch import patch_unet, unpatch_unet
from mapo_fast.settings.load import with_settings
from mapo_fast.util.errors import UserError
from mapo_kernels.hardware import Card
from mapo_kernels.weights import views_of_one
from tests.engine.test_engine import CPU, FP64, settings, trained
from tests.engine.test_speed import PLANS, with_speed
from tests.unets import make_unet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    return trained(with_speed(settings(), fp8=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "switches"),
    [("split", {}), ("joint", {"fused_ops": False}), ("split", {"channels_last": True, "fused_ops": False})],
)
def test_the_same_steps_in_every_layout(
    truth: dict[str, Tensor], plan: str, switches: dict[str, Any]
) -> None:
    """Scales are a row's own: what a sample gives does not depend on how samples are put together."""
    found = trained(with_speed(settings(**PLANS[plan]), fp8=True, **switches))
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        assert float((found[name] - expected).norm() / expected.norm().clamp(min=1e-6)) <= 1e-10, name


@pytest.mark.slow
def test_it_rounds(truth: dict[str, Tensor]) -> None:
    plain = trained(settings())
    moved = [float((truth[n] - w).norm() / w.norm().clamp(min=1e-6)) for n, w in plain.items()]
    assert max(moved) > 1e-4


def test_which_layers() -> None:
    """Layers of transformer blocks with suitable sizes change; names, Parameters and joined views stay."""
    unet = make_unet("sdxl")
    before = dict(unet.named_parameters())
    use_fp8(unet)
    patch_unet(unet)
    found = {name for name, layer in unet.named_modules() if type(layer) is Fp8Linear}
    assert all(".transformer_blocks." in name for name in found)
    assert any(name.endswith("attn1.to_q") for name in found)
    assert any(name.endswith("ff.net.2") for name in found)
    assert not any(name.endswith("attn2.to_k") for name in found)  # of 24 features
    assert all(p is before[name] for name, p in unet.named_parameters())
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    joined = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
    assert views_of_one(joined) is not None
    unpatch_unet(unet)
    assert views_of_one(joined) is None


def test_needs_a_gpu_that_multiplies_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapo_fast.engine.fp8.in_fp8", lambda device: False)
    monkeypatch.setattr("mapo_fast.engine.fp8.card", lambda device: Card(86, 82))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    training = with_speed(settings(), fp8=True)
    base = with_settings(settings("lora"), {"adapter.base": "fp8"})
    for config, setting, instead in (
        (training, r"speed\.fp8 = true", r"set speed\.fp8 = false"),
        (base, r"adapter\.base = 'fp8'", "use adapter.base = 'int8', as small and more exact"),
    ):
        message = rf"{setting} needs .* 8\.9 or newer .*, not NVIDIA GeForce RTX 3090 \(8\.6\): {instead}$"
        with pytest.raises(UserError, match=message) as caught:
            prepare_unet(make_unet("sdxl"), config, FP64, torch.device("cuda"))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("mapo_fast.engine.fp8.card", lambda device: Card(89, 128))
    with pytest.raises(
        UserError, match=r"needs Triton on Linux, which .* has not here: set speed\.fp8 = false$"
    ):
        prepare_unet(make_unet("sdxl"), training, FP64, torch.device("cuda"))
    prepare_unet(make_unet("sdxl"), training, FP64, CPU)
