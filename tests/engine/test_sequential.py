"""`sequential` gives joint's gradients, pair by pair or half by half, and holds one half at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.live_memory import LiveMemory
from mapo_fast import MaPOLoss, SFTLoss
from mapo_fast.engine import sequential
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.offload_activations import ActivationOffload
from mapo_fast.engine.sequential import sequential_backward
from mapo_fast.engine.step import PairInputs
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.engine.transfers import Transfers
from mapo_fast.models.patch import patch_unet
from mapo_kernels import OBJECTIVES
from tests.delayed_transfers import DelayedTransfers
from tests.engine.pair_steps import (
    MODELS,
    PAIRS,
    SOME_BLOCKS,
    ObjectiveLoss,
    add_lora,
    gradients,
    joint_backward,
    pair_of_inputs,
    trainable,
    worst,
)
from tests.unets import make_unet

VARIANTS = pytest.mark.parametrize("scratch", [True, False], ids=["scratch", "extra_forward"])


def backward(unet: Any, inputs: PairInputs, loss: Any, scratch: bool, **settings: Any) -> Any:
    settings = {"weight": 1.0, **settings}
    return sequential_backward(unet, inputs, loss, trainable(unet), scratch=scratch, **settings)


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the UNet predicts, call by call."""
    seen: list[Tensor] = []

    def recorded(unet: Any, inputs: PairInputs) -> Tensor:
        seen.append(predict(unet, inputs))
        return seen[-1]

    predict = sequential.predict
    monkeypatch.setattr(sequential, "predict", recorded)
    return seen


# --- Exactness ---


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective: str) -> None:
    """Three pairs with coefficients of their own, all weights trained, in fp64."""
    unet, inputs, loss = make_unet("sdxl"), pair_of_inputs(), ObjectiveLoss(objective)
    out = []
    truth = gradients(unet, lambda: out.append(joint_backward(unet, inputs, loss)))
    for scratch in (True, False):
        found = gradients(unet, lambda s=scratch: out.append(backward(unet, inputs, loss, s)))
        assert worst(found, truth) <= 1e-10
    for mine in out[1:]:
        assert not mine.loss.requires_grad
        for name, value, want in zip(mine._fields, mine, out[0], strict=True):
            if want is None:
                assert value is None
            else:
                torch.testing.assert_close(value, want.detach(), rtol=1e-9, atol=1e-9, msg=name)


def test_coefficients_of_the_pairs_differ() -> None:
    """Else the tests here would pass with one coefficient for all."""
    unet, inputs = make_unet("sdxl"), pair_of_inputs()
    errors = joint_backward(unet, inputs, MaPOLoss())[1:3]
    leaves = [e.requires_grad_() for e in errors]
    for slopes in torch.autograd.grad(MaPOLoss().from_errors(*leaves).loss, leaves):
        ordered = slopes.sort().values
        assert (ordered.diff() > 0.1 * ordered.abs().max()).all()


@pytest.mark.slow
@VARIANTS
@pytest.mark.parametrize(("kind", "patched", "checkpointing"), MODELS, ids=str)
def test_every_model(kind: str, patched: bool, checkpointing: Any, scratch: bool) -> None:
    unet, inputs = make_unet("sdxl"), pair_of_inputs()
    if kind == "lora":
        add_lora(unet)
    truth = gradients(unet, lambda: joint_backward(unet, inputs, MaPOLoss()))
    if patched:
        patch_unet(unet)
    apply_layout(unet, "sequential", gradient_checkpointing=checkpointing)
    assert worst(gradients(unet, lambda: backward(unet, inputs, MaPOLoss(), scratch)), truth) <= 1e-10


@pytest.mark.slow
@VARIANTS
def test_micro_batches_add_up(scratch: bool) -> None:
    """Weights of 3/4 and 1/4, the second on top of the first one's gradients."""
    unet, first, second = make_unet("sdxl"), pair_of_inputs(), pair_of_inputs(pairs=1)
    loss = MaPOLoss()
    one = gradients(unet, lambda: joint_backward(unet, first, loss))
    two = gradients(unet, lambda: joint_backward(unet, second, loss))

    def both() -> None:
        backward(unet, first, loss, scratch, weight=0.75)
        backward(unet, second, loss, scratch, weight=0.25)

    assert worst(gradients(unet, both), {n: 0.75 * one[n] + 0.25 * two[n] for n in one}) <= 1e-10


@pytest.mark.slow
@VARIANTS
def test_gradient_scaler(scratch: bool) -> None:
    unet, inputs = make_unet("sdxl"), pair_of_inputs()
    truth = gradients(unet, lambda: joint_backward(unet, inputs, MaPOLoss()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = gradients(unet, lambda: backward(unet, inputs, MaPOLoss(), scratch, scale=scaler))
    assert worst(found, {name: 1024 * t for name, t in truth.items()}) <= 1e-10


@pytest.mark.slow
@VARIANTS
def test_autocast_is_of_the_forward_passes(scratch: bool, predictions: list[Tensor]) -> None:
    """Predictions in bf16, errors in fp32, no autocast left over for backward."""
    unet, inputs = make_unet("sdxl", dtype=torch.float32), pair_of_inputs(dtype=torch.float32)
    inside = []
    unet.mid_block.register_full_backward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    context = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
    out = backward(unet, inputs, MaPOLoss(), scratch, context=context)
    assert {p.dtype for p in predictions} == {torch.bfloat16}
    assert out.loss.dtype == torch.float32
    assert inside
    assert not any(inside)


@pytest.mark.slow
def test_two_buffers_of_several_pairs_cannot_be_recombined() -> None:
    """Why `scratch` goes pair by pair: the best x·Σ∇e_w + y·Σ∇e_l misses what three pairs need."""
    unet, inputs, loss = make_unet("sdxl"), pair_of_inputs(), MaPOLoss()

    def flat(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in found.values()])

    truth = flat(gradients(unet, lambda: joint_backward(unet, inputs, loss)))
    chosen = flat(gradients(unet, lambda: joint_backward(unet, inputs, SFTLoss())))
    swapped = PairInputs(*(torch.cat([x[PAIRS:], x[:PAIRS]]) for x in inputs))
    rejected = flat(gradients(unet, lambda: joint_backward(unet, swapped, SFTLoss())))
    sums = torch.stack([chosen, rejected], dim=1)
    best = sums @ torch.linalg.lstsq(sums, truth[:, None]).solution[:, 0]
    assert (best - truth).norm() > 0.1 * truth.norm()


# --- Dropout ---


def test_both_passes_of_a_rejected_half_drop_the_same(predictions: list[Tensor]) -> None:
    unet, inputs = make_unet("sdxl"), pair_of_inputs()
    inputs = PairInputs(*(torch.cat([x[:PAIRS], x[:PAIRS]]) for x in inputs))
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    backward(unet, inputs, MaPOLoss(), scratch=False)
    after = torch.rand(1)
    without, chosen, rejected = predictions
    assert torch.equal(without, rejected)
    assert not torch.equal(chosen, rejected)
    assert after not in torch.cat([chosen.flatten(), rejected.flatten()])


@pytest.mark.slow
@VARIANTS
@pytest.mark.parametrize("lora", [False, True], ids=["dropout", "lora_dropout"])
def test_recomputed_dropout_drops_the_same(lora: bool, scratch: bool) -> None:
    unet, inputs = make_unet("sdxl"), pair_of_inputs()
    if lora:
        add_lora(unet, dropout=0.3)
    else:
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    found = []
    for checkpointing in (False, True):
        apply_layout(unet, "sequential", gradient_checkpointing=checkpointing)
        torch.manual_seed(5)
        found.append(gradients(unet, lambda: backward(unet, inputs, MaPOLoss(), scratch)))
    assert worst(found[1], found[0]) <= 1e-10


# --- With what moves between host and device ---


@pytest.mark.slow
@VARIANTS
@pytest.mark.parametrize("copies", [Transfers, DelayedTransfers])
def test_streamed_weights_and_offloaded_inputs(
    copies: type[Transfers], scratch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mapo_fast.engine.stream_weights.STREAMED_BYTES", 1)
    monkeypatch.setattr("mapo_fast.engine.offload_activations.OFFLOADED_BYTES", 1)
    unet, inputs = make_unet("sdxl"), pair_of_inputs()
    add_lora(unet)
    truth = gradients(unet, lambda: joint_backward(unet, inputs, MaPOLoss()))
    transfers = copies(torch.device("cpu"))
    WeightStreaming(patch_unet(unet), transfers)
    offload = ActivationOffload(transfers)
    apply_layout(unet, "sequential", gradient_checkpointing=SOME_BLOCKS, offload=offload)
    for _ in range(2):
        assert worst(gradients(unet, lambda: backward(unet, inputs, MaPOLoss(), scratch)), truth) <= 1e-10
        offload.reset()


# --- Memory ---


@pytest.mark.slow
@VARIANTS
def test_one_half_at_a_time(scratch: bool, predictions: list[Tensor]) -> None:
    unet, inputs = make_unet("sdxl", dtype=torch.float32), pair_of_inputs(1, torch.float32, side=32)
    add_lora(unet)
    peaks = {}
    for name, run in (("joint", joint_backward), ("sequential", lambda *a: backward(*a, scratch=scratch))):
        unet.zero_grad(set_to_none=True)
        with LiveMemory([*unet.parameters(), *inputs]) as memory:
            start = memory.live
            run(unet, inputs, MaPOLoss())
        peaks[name] = memory.peak - start
    assert {len(p) for p in predictions} == {1}
    assert peaks["sequential"] < 0.55 * peaks["joint"]


def test_the_first_pair_needs_no_second_set_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen half's scratch becomes the gradient."""
    unet, inputs = make_unet("sdxl"), pair_of_inputs(pairs=1)
    scratch: list[list[int]] = []

    def recorded(unet: Any, inputs: PairInputs) -> Tensor:
        scratch.append([p.grad.data_ptr() for p in trainable(unet) if p.grad is not None])
        return predict(unet, inputs)

    predict = sequential.predict
    monkeypatch.setattr(sequential, "predict", recorded)
    backward(unet, inputs, MaPOLoss(), scratch=True)
    assert scratch == [[], [p.grad.data_ptr() for p in trainable(unet)]]
