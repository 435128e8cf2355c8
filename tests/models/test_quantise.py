"""The frozen base in fewer bits: what is stored, that nothing else changes, and what it costs."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mapo_fast import patch_unet, unpatch_unet
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.models.lora import add_lora, lora_state_dict, save_lora
from mapo_fast.models.quantise import INT8, QuantisedConv2d, QuantisedLinear, quantise_base
from mapo_fast.util.errors import UserError
from mapo_kernels.weights import dense_weight, views_of_one
from tests.unets import make_unet, run

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*adapter.*:UserWarning"),
]
CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
EXACT: Any = pytest.mark.parametrize("base", ["int8", "nf4"])
"""The ones that round no activations."""
BASES: Any = pytest.mark.parametrize("base", ["int8", "nf4", "fp8"])


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' UNet has few layers of 4,096 weights."""
    monkeypatch.setattr("mapo_fast.models.quantise.SMALLEST", 256)


def stored(unet: Any) -> dict[str, Any]:
    return {n: m for n, m in unet.named_modules() if isinstance(m, QuantisedLinear | QuantisedConv2d)}


def quantised(base: Any, *, seed: int = 0) -> Any:
    """For arithmetic in fp64; bitsandbytes takes fp32 and below."""
    unet = make_unet("sdxl", dtype=torch.float32, seed=seed)
    quantise_base(unet, base, CPU)
    return unet.double()


def dense_twin(unet: Any) -> Any:
    """The plain UNet with the weights that the quantised one stands for."""
    twin = make_unet("sdxl", dtype=torch.float64)
    layers = stored(unet)
    state = {name: t for name, t in unet.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        state[f"{name}.weight"] = dense_weight(layer.frozen_weight, torch.float64)
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    twin.load_state_dict(state)
    return twin


def adapt(unet: Any, targets: tuple[str, ...] = TARGETS) -> Any:
    add_lora(unet, rank=4, alpha=6.0, targets=targets, seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return unet


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert float((got[name] - want[name]).norm() / want[name].norm()) <= 1e-9, name


@pytest.mark.slow
@EXACT
@pytest.mark.parametrize("targets", [TARGETS, ("conv1", "conv_shortcut", "proj_in", "ff.net.2", "to_v")])
@pytest.mark.parametrize("patched", [False, True])
def test_it_is_the_dense_twin(base: Any, targets: tuple[str, ...], patched: bool) -> None:
    """Outputs and gradients of what the codes stand for, in fp64; adapters on linears and convolutions."""
    unet = quantised(base)
    twin = adapt(dense_twin(unet), targets)
    adapt(unet, targets)
    want = run(twin, "sdxl", torch.float64)
    assert any("lora_A" in name for name in want)
    assert_same(run(patch_unet(unet) if patched else unet, "sdxl", torch.float64), want)


@pytest.mark.slow
@BASES
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_recomputed_in_backward(base: Any, layout: Any) -> None:
    unet = quantised(base)
    want = run(adapt(unet), "sdxl", torch.float64)
    apply_layout(patch_unet(unet), layout, gradient_checkpointing=True, offload=None)
    assert_same(run(unet, "sdxl", torch.float64), want)


@pytest.mark.slow
@BASES
def test_what_is_stored(base: Any) -> None:
    unet = make_unet("sdxl", dtype=torch.bfloat16)
    before = {
        name: (m.weight.nbytes, m.weight.numel())
        for name, m in unet.named_modules()
        if hasattr(m, "weight") and m.weight is not None
    }
    dense = {
        name: copy.deepcopy(m) for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    report = quantise_base(unet, base, CPU)
    layers = stored(unet)
    assert [layer.name for layer in report] == list(layers)
    assert {"conv_in", "conv_out"}.isdisjoint(layers)
    left = [n for n, m in unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert all(before[name][1] < 256 or name in ("conv_in", "conv_out") for name in left)
    for row in report:
        layer, weight = layers[row.name], dense[row.name].weight.detach().float()
        assert row.dense_bytes == before[row.name][0]
        assert row.stored_bytes == sum(t.nbytes for t in layer.frozen_weight.tensors)
        fine = row.name.rpartition(".")[2] in INT8 or isinstance(layer, QuantisedConv2d)
        if base == "fp8":
            fine |= ".transformer_blocks." not in row.name or any(n % 16 for n in weight.shape)
        assert row.kind == ("int8 conv" if isinstance(layer, QuantisedConv2d) else "int8" if fine else base)
        if weight.numel() >= 4096 and row.kind == "nf4":  # smaller ones pay for a table of 1 KiB
            assert row.stored_bytes < 0.4 * row.dense_bytes
        error = float((dense_weight(layer.frozen_weight, torch.float32) - weight).norm() / weight.norm())
        assert error <= {"nf4": 0.12, "fp8": 0.04, "int8": 0.01, "int8 conv": 0.01}[row.kind]
        assert not layer.weight.requires_grad
        assert not layer.weight.is_floating_point()


@pytest.mark.slow
def test_fp8_fused_is_fp8_unfused() -> None:
    """Rounding is equal with q, k and v as one product and with adapters; joined codes come apart again."""
    unet = quantised("fp8")
    want = run(adapt(copy.deepcopy(unet)), "sdxl", torch.float64)
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    codes = [layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]
    patch_unet(unet)
    assert views_of_one(codes) is not None
    assert all(torch.equal(t, before[name]) for name, t in unet.state_dict().items())
    assert_same(run(adapt(unet), "sdxl", torch.float64), want)
    unpatch_unet(unet)
    assert views_of_one(codes) is None


def test_a_channel_of_zeros() -> None:
    unet = make_unet("sdxl", dtype=torch.float32)
    for layer in (unet.mid_block.resnets[0].conv1, unet.mid_block.attentions[0].proj_in):
        layer.weight.data[3] = 0
    quantise_base(unet, "int8", CPU)
    for layer in (unet.mid_block.resnets[0].conv1, unet.mid_block.attentions[0].proj_in):
        weight = dense_weight(layer.frozen_weight, torch.float32)
        assert weight.isfinite().all()
        assert not weight[3].any()


@pytest.mark.slow
@BASES
def test_moving_and_casting_keep_the_scales(base: Any) -> None:
    """`.to(dtype)` casts what is dense; scales are fp32 for ever."""
    unet = quantised(base)
    before = {name: [t.clone() for t in layer.frozen_weight.tensors] for name, layer in stored(unet).items()}
    again = copy.deepcopy(unet).to(torch.bfloat16).to(memory_format=torch.channels_last)
    for name, layer in stored(again).items():
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype
            for a, b in zip(layer.frozen_weight.tensors, before[name], strict=True)
        )
    assert again.dtype == torch.bfloat16
    out = run(again, "sdxl", torch.bfloat16)["output"]
    assert out.isfinite().all()
    fresh = quantised(base, seed=1)
    fresh.load_state_dict(unet.state_dict())
    want, got = (run(u, "sdxl", torch.float64)["output"] for u in (unet, fresh))
    assert torch.equal(got, want)


@pytest.mark.slow
@BASES
def test_the_adapters_files_are_the_same(base: Any, tmp_path: Path) -> None:
    """Metadata, names and bytes are those of an adapter on a dense base."""

    def content(file: Path) -> Any:
        with safe_open(file, "pt") as opened:
            return opened.metadata(), {
                name: opened.get_tensor(name).numpy().tobytes()
                for name in opened.keys()  # noqa: SIM118
            }

    saved = []
    for quantised in (False, True):
        unet = make_unet("sdxl", dtype=torch.bfloat16)
        if quantised:
            quantise_base(unet, base, CPU)
        add_lora(unet, rank=4, alpha=6.0, targets=(*TARGETS, "conv1"), seed=0)
        folder = tmp_path / str(quantised)
        save_lora(unet, folder)
        saved.append({file.name: content(file) for file in folder.iterdir()})
        assert all(t.dtype == torch.float32 for t in lora_state_dict(unet).values())
    assert saved[0] == saved[1]


@pytest.mark.slow
@BASES
def test_saves_neither_dense_weights_nor_inputs(base: Any) -> None:
    """Everything that the patched UNet saves but the dense one does not are codes and scales."""
    totals = []
    for quantised in (False, True):
        unet = make_unet("sdxl", dtype=torch.bfloat16)
        if quantised:
            quantise_base(unet, base, CPU)
        add_lora(unet, rank=4, alpha=6.0, targets=TARGETS, seed=0, dtype=torch.bfloat16)
        patch_unet(unet)
        own = {t.untyped_storage().data_ptr() for t in (*unet.parameters(), *unet.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(unet, "sdxl", torch.bfloat16)
        totals.append(sum(kept.values()))
    assert 0 < totals[1] <= totals[0]


@pytest.mark.slow
@BASES
def test_sizes_without_weights(base: Any) -> None:
    """Meta and fake UNets become exactly what a real one does, and bitsandbytes is not asked."""

    def layout(unet: Any) -> dict[str, Any]:
        return {n: (tuple(t.shape), t.dtype) for n, t in unet.state_dict().items()}

    real = make_unet("sdxl", dtype=torch.bfloat16)
    want = quantise_base(real, base, CPU)
    meta = make_unet("sdxl", dtype=torch.bfloat16).to("meta")
    assert quantise_base(meta, base, CPU) == want
    assert layout(meta) == layout(real)
    mode = FakeTensorMode()
    fake = make_unet("sdxl", dtype=torch.bfloat16)
    for module in fake.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(FakeTensor(mode, p.detach().to("meta"), CPU), False)
    assert quantise_base(fake, base, CPU) == want
    assert layout(fake) == layout(real)
    with mode:
        out = patch_unet(fake)(
            torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16),
            torch.zeros(2),
            torch.zeros(2, 5, 24, dtype=torch.bfloat16),
            added_cond_kwargs={"text_embeds": torch.zeros(2, 12), "time_ids": torch.zeros(2, 6)},
        ).sample
    assert isinstance(out, FakeTensor)
    assert out.shape == (2, 4, 8, 8)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"need bitsandbytes, which cannot be imported .*'dense'") as caught:
        quantise_base(make_unet("sdxl"), "nf4", CPU)
    assert "\n" not in str(caught.value)
