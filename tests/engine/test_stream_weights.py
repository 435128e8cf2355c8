"""Weights streamed from host memory: the same numbers, only two units on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.stream_weights import Unit, WeightStreaming
from mapo_fast.engine.transfers import Transfers
from mapo_fast.models.lora import add_lora
from mapo_fast.models.patch import FusedTransformerBlock, patch_unet
from mapo_fast.models.sdxl import execution_order
from mapo_kernels.weights import views_of_one
from tests.delayed_transfers import DelayedTransfers
from tests.unets import inputs, make_unet, run

DEVICE = torch.device("cpu")
FORMS = ["plain", "checkpointed", "split"]


@pytest.fixture(autouse=True)
def _stream_all_but_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapo_fast.engine.stream_weights.STREAMED_BYTES", 600)


def _make(form: str = "plain", *, lora: bool = False, patched: bool = False, family: str = "sdxl") -> Any:
    unet = make_unet(family)
    if lora:
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "ff.net.2"]
        add_lora(unet, rank=2, alpha=4.0, targets=targets, seed=0, dtype=torch.float64)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
    if patched:
        patch_unet(unet)
    apply_layout(unet, "split" if form == "split" else "joint", gradient_checkpointing=form != "plain")
    return unet


def _worst(measured: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert measured.keys() == truth.keys()
    return max(
        float((measured[name] - truth[name]).norm() / truth[name].norm().clamp(min=1e-30)) for name in truth
    )


@cache
def _resident(lora: bool, patched: bool) -> dict[str, Tensor]:
    return run(_make("plain", lora=lora, patched=patched), "sdxl", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "lora", "patched", "transfers"),
    [
        *((form, tuned, tuned, DelayedTransfers) for form in FORMS for tuned in (False, True)),
        ("split", False, True, Transfers),
        ("plain", True, False, Transfers),
    ],
)
def test_gradients_are_those_of_resident_weights(
    form: str, lora: bool, patched: bool, transfers: Callable[[torch.device], Transfers]
) -> None:
    unet = _make(form, lora=lora, patched=patched)
    streaming = WeightStreaming(unet, transfers(DEVICE))
    assert len(streaming.units) > 15
    for _ in range(2):  # the second pass starts from whatever the first has left in the slots
        assert _worst(run(unet, "sdxl", torch.float64), _resident(lora, patched)) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_other_families(family: str) -> None:
    truth = run(_make(family=family), family, torch.float64)
    unet = _make(family=family)
    WeightStreaming(unet, DelayedTransfers())
    assert _worst(run(unet, family, torch.float64), truth) <= 1e-10


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_units_are_in_order_of_execution(family: str) -> None:
    unet = _make(family=family)
    listed = dict(execution_order(unet))
    ran: list[str] = []
    for name, module in listed.items():
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    latents, others = inputs(family, torch.float64)
    with torch.no_grad():  # in training norms run again in backward
        unet(latents, **others)
    assert ran == list(listed)
    missing = set(unet.parameters()) - {p for m in listed.values() for p in m.parameters()}
    assert not missing


def test_only_two_units_are_on_the_device_and_each_is_fetched_once_a_pass() -> None:
    unet = _make("checkpointed")
    weights = sum(p.nbytes for p in unet.parameters())
    transfers = DelayedTransfers()
    streaming = WeightStreaming(unet, transfers)
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in unet.parameters()}
    assert sum(storages.values()) < 0.5 * weights
    assert transfers.host_bytes == sum(unit.nbytes for unit in streaming.units) >= 0.99 * weights - 5000
    run(unet, "sdxl", torch.float64)
    transfers.fetched_bytes = 0
    run(unet, "sdxl", torch.float64)
    turning = sum(unit.nbytes for unit in (*streaming.units[:2], *streaming.units[-2:]))
    assert transfers.fetched_bytes == 2 * transfers.host_bytes - turning


@pytest.mark.slow
def test_the_next_unit_is_under_way_while_one_computes() -> None:
    unet = _make("checkpointed")
    streaming = WeightStreaming(unet, DelayedTransfers())
    late: list[str] = []
    fetch = streaming.transfers.fetch

    def watched(dst: Tensor, src: Tensor) -> Any:
        unit = next(u for u in streaming.units if u.host.data_ptr() == src.data_ptr())
        if due is unit:
            late.append(unit.name)
        return fetch(dst, src)

    due: Unit | None = None
    ensure = streaming.ensure

    def noting(unit: Unit) -> None:
        nonlocal due
        due = unit
        ensure(unit)

    streaming.transfers.fetch = watched  # type: ignore[method-assign]
    streaming.ensure = noting  # type: ignore[method-assign]
    run(unet, "sdxl", torch.float64)
    assert late == [streaming.units[0].name]  # nothing runs in front of the very first
    run(unet, "sdxl", torch.float64)
    assert late == [streaming.units[0].name]
    latents, others = inputs("sdxl", torch.float64)
    with torch.no_grad():
        unet(latents, **others)
        assert late == [streaming.units[0].name]
        unet(latents, **others)
    assert late == [streaming.units[0].name] * 2  # evaluations start over from the last unit


@pytest.mark.slow
def test_parameters_never_move() -> None:
    unet = _make("split", patched=True)
    streaming = WeightStreaming(unet, DelayedTransfers())
    places = {name: p.data_ptr() for name, p in unet.named_parameters()}
    run(unet, "sdxl", torch.float64)
    streaming.state_dict()
    assert places == {name: p.data_ptr() for name, p in unet.named_parameters()}
    for unit in streaming.units:
        assert all(streaming.unit_of(p) is unit for p in unit.parameters)
    assert streaming.unit_of(unet.conv_in.weight) is None


@pytest.mark.slow
def test_units_stay_fused_and_joined() -> None:
    unet = _make("checkpointed", lora=True, patched=True)
    WeightStreaming(unet, Transfers(DEVICE))
    blocks = [m for m in unet.modules() if isinstance(m, FusedTransformerBlock)]
    assert blocks
    for block in blocks:
        attn: Any = block.attn1
        weights = [layer.base_layer.weight for layer in (attn.to_q, attn.to_k, attn.to_v)]
        assert views_of_one(weights) is not None
    calls = _fused_calls(unet)
    plain = _make("checkpointed", lora=True, patched=True)
    assert calls == _fused_calls(plain)
    assert any("lora_linear" in name for name in calls)


def _fused_calls(unet: Any) -> dict[str, int]:
    latents, others = inputs("sdxl", torch.float64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
        unet(latents, **others)
    return {event.key: event.count for event in profile.key_averages() if "mapo" in event.key}


def test_only_frozen_weights_stream_beside_an_adapter() -> None:
    unet = _make(lora=True)
    streaming = WeightStreaming(unet, Transfers(DEVICE))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            assert streaming.unit_of(parameter) is None, name
        elif ".transformer_blocks." in name or ".resnets." in name:
            assert streaming.unit_of(parameter) is not None, name


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_full_fine_tuning_with_updates_inside_backward(form: str) -> None:
    """SGD by gradient hooks as soon as a unit is complete: what a fused step does."""

    def step(unet: Any, update: Callable[[nn.Parameter], None]) -> None:
        for parameter in unet.parameters():
            parameter.register_post_accumulate_grad_hook(update)

    def descend(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=1e-3)
        parameter.grad = None

    resident = _make(form)
    step(resident, descend)
    unet = _make(form)
    transfers = DelayedTransfers()
    streaming = WeightStreaming(unet, transfers)
    complete: dict[str, int] = {}

    def descend_and_store(parameter: nn.Parameter) -> None:
        unit = streaming.unit_of(parameter)
        descend(parameter)
        if unit is not None:
            complete[unit.name] = complete.get(unit.name, 0) + 1
            if complete[unit.name] % len(unit.parameters) == 0:
                streaming.updated(unit)

    step(unet, descend_and_store)
    start = {name: t.clone() for name, t in streaming.state_dict().items()}
    for _ in range(3):
        truth, measured = run(resident, "sdxl", torch.float64), run(unet, "sdxl", torch.float64)
        assert _worst(measured, truth) <= 1e-10
        assert _worst(streaming.state_dict(), resident.state_dict()) <= 1e-10
    assert all(not torch.equal(t, start[name]) for name, t in streaming.state_dict().items())
    per_step = sum(unit.nbytes for unit in streaming.units)
    assert transfers.stored_bytes == 3 * per_step


@pytest.mark.slow
def test_evaluation_and_saving_in_between() -> None:
    truth = run(_make("checkpointed"), "sdxl", torch.float64)
    unet = _make("checkpointed")
    streaming = WeightStreaming(unet, DelayedTransfers())
    for _ in range(2):
        run(unet, "sdxl", torch.float64)
        latents, others = inputs("sdxl", torch.float64)
        with torch.no_grad():
            for _ in range(2):
                out = unet(latents, **others).sample
                torch.testing.assert_close(out, truth["output"], rtol=1e-10, atol=1e-12)
        assert _worst(streaming.state_dict(), _make().state_dict()) == 0
        assert _worst(run(unet, "sdxl", torch.float64), truth) <= 1e-10


@pytest.mark.slow
def test_loading_into_host_memory() -> None:
    other = make_unet("sdxl", seed=3)
    unet = _make("checkpointed", patched=True)
    streaming = WeightStreaming(unet, DelayedTransfers())
    run(unet, "sdxl", torch.float64)
    tensors = streaming.state_dict()
    assert tensors.keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        tensors[name].copy_(tensor)
    streaming.reload()
    assert _worst(run(unet, "sdxl", torch.float64), run(other, "sdxl", torch.float64)) <= 1e-10


def test_an_update_of_a_unit_that_is_not_there_is_refused() -> None:
    unet = _make()
    streaming = WeightStreaming(unet, Transfers(DEVICE))
    run(unet, "sdxl", torch.float64)
    with pytest.raises(RuntimeError, match=r"conv_out were updated while its slot held"):
        streaming.updated(streaming.units[-1])
    streaming.ensure(streaming.units[-1])
    streaming.updated(streaming.units[-1])


def test_strides_and_mixed_types_survive() -> None:
    unet = _make()
    unet.to(memory_format=torch.channels_last)
    unet.mid_block.resnets[0].norm1.float()
    before = {name: (t.clone(), t.stride()) for name, t in unet.state_dict().items()}
    streaming = WeightStreaming(unet, Transfers(DEVICE))
    for unit in streaming.units:
        streaming.ensure(unit)
        for parameter in unit.parameters:
            name = next(n for n, p in unet.named_parameters() if p is parameter)
            assert torch.equal(parameter, before[name][0])
            assert parameter.stride() == before[name][1]


def test_small_units_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapo_fast.engine.stream_weights.STREAMED_BYTES", 20_000)
    unet = _make()
    streaming = WeightStreaming(unet, Transfers(DEVICE))
    assert all(unit.nbytes >= 20_000 for unit in streaming.units)
    assert "conv_out" not in [unit.name for unit in streaming.units]
    truth = run(_make(), "sdxl", torch.float64)
    assert _worst(run(unet, "sdxl", torch.float64), truth) <= 1e-10
