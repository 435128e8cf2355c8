"""Inputs of checkpointed blocks that wait in host memory: the same numbers, less on the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.offload_activations import ActivationOffload
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.engine.transfers import Transfers
from mapo_fast.models.patch import patch_unet
from tests.delayed_transfers import DelayedTransfers
from tests.unets import inputs, make_unet, run

DEVICE = torch.device("cpu")
BLOCKS = 6


@pytest.fixture(autouse=True)
def _offload_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapo_fast.engine.offload_activations.OFFLOADED_BYTES", 1)
    monkeypatch.setattr("mapo_fast.engine.stream_weights.STREAMED_BYTES", 1)


@pytest.mark.slow
@pytest.mark.parametrize("transfers", [Transfers, DelayedTransfers])
@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_are_those_of_inputs_on_the_device(
    layout: Any, streamed: bool, transfers: Callable[[torch.device], Transfers]
) -> None:
    unet = make_unet("sdxl")
    if streamed:
        patch_unet(unet)
    truth = run(unet, "sdxl", torch.float64)
    copies = transfers(DEVICE)
    offload = ActivationOffload(copies)
    if streamed:
        WeightStreaming(unet, copies)
    apply_layout(unet, layout, gradient_checkpointing=True, offload=offload)
    for _ in range(2):
        measured = run(unet, "sdxl", torch.float64)
        assert measured.keys() == truth.keys()
        worst = max(float((measured[n] - t).norm() / t.norm().clamp(min=1e-30)) for n, t in truth.items())
        assert worst <= 1e-10
        offload.reset()
        assert len(offload._memory) > 5
        assert sorted(offload._free) == list(range(len(offload._memory)))  # autograd has dropped all
        for memory in offload._memory:
            memory.fill_(255)  # NaN: nothing of this step may be read in the next


class _Chain:
    """Checkpointed blocks in a row, and what is alive of their inputs."""

    def __init__(self, transfers: Transfers, width: int = 16) -> None:
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(BLOCKS))
        self.offload = ActivationOffload(transfers)
        self.inputs: list[weakref.ref[torch.UntypedStorage]] = []
        self.alive: list[int] = []
        for block in self.blocks:
            block.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs.append(weakref.ref(args[0].untyped_storage()))
        self.alive.append(sum(ref() is not None for ref in self.inputs))

    def forward(self, x: Tensor, *, offloaded: bool = True) -> Tensor:
        for block in self.blocks:
            if offloaded:
                with self.offload.around():
                    x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
            else:
                x = block(x)
        return x

    def gradients(self, x: Tensor, *, offloaded: bool = True) -> list[Tensor]:
        self.blocks.zero_grad(set_to_none=True)
        self.forward(x, offloaded=offloaded).square().sum().backward()
        return [p.grad.clone() for p in self.blocks.parameters() if p.grad is not None]


def _same(measured: list[Tensor], truth: list[Tensor]) -> bool:
    return len(measured) == len(truth) > 0 and all(
        torch.equal(a, b) for a, b in zip(measured, truth, strict=True)
    )


def test_the_device_holds_one_input_beside_the_block_at_work() -> None:
    chain = _Chain(DelayedTransfers())
    chain.forward(torch.tanh(torch.randn(8, 16, requires_grad=True)))
    assert chain.alive == [1] + [2] * (BLOCKS - 1)  # its own input, and the one before until it is packed
    chain.inputs.clear()
    chain.alive.clear()
    chain.gradients(torch.tanh(torch.randn(8, 16, requires_grad=True)))
    assert max(chain.alive) <= 3  # and in backward one on its way in


def test_each_input_is_fetched_once_and_ahead_of_use() -> None:
    transfers = DelayedTransfers()
    chain = _Chain(transfers)
    late = []
    fetch = chain.offload._fetch

    def watched(saved: Any) -> Tensor:
        late.append((saved.number, saved.flat is None))
        return fetch(saved)

    chain.offload._fetch = watched  # type: ignore[method-assign]
    x = torch.randn(8, 16)
    chain.gradients(x)
    bytes_in, bytes_out = transfers.fetched_bytes, transfers.stored_bytes
    assert bytes_out == BLOCKS * x.nbytes
    assert bytes_in == (BLOCKS - 1) * x.nbytes  # the last one has not left when backward wants it
    numbers = range(BLOCKS - 1, -1, -1)
    asked = [(number, False) for number in numbers]  # there, or on its way
    assert (
        late
        == [pair for number in numbers for pair in ([asked[BLOCKS - 1 - number], (number - 1, True)])][:-1]
    )


def test_what_is_saved_by_every_block_is_stored_once() -> None:
    transfers = DelayedTransfers()
    offload = ActivationOffload(transfers)
    prompt = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    for _ in range(5):
        with offload.around():
            x = checkpoint(lambda a, b: torch.tanh(a @ weight + b), x, prompt, use_reentrant=False)
    x.sum().backward()
    assert transfers.stored_bytes == 6 * prompt.nbytes


def test_halves_of_one_tensor_are_stored_by_themselves() -> None:
    transfers = DelayedTransfers()
    offload = ActivationOffload(transfers)
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    whole = x.clone()
    for half in whole.chunk(2):
        with offload.around():
            out = checkpoint(lambda half: half @ weight, half, use_reentrant=False)
    storage = weakref.ref(whole.untyped_storage())
    assert transfers.stored_bytes == x.nbytes
    del whole, half
    offload.reset()
    assert storage() is None
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x[2:].T @ torch.ones(2, 8))


def test_an_input_is_the_recomputations_alone() -> None:
    """What the block does not save of it is free as soon as the block has been recomputed."""
    offload = ActivationOffload(DelayedTransfers())
    weight = torch.randn(8, requires_grad=True)
    inputs: list[weakref.ref[torch.UntypedStorage]] = []
    gone: list[bool] = []

    def block(x: Tensor) -> Tensor:
        inputs.append(weakref.ref(x.untyped_storage()))
        inner = torch.tanh(x + weight)
        if inner.requires_grad:
            inner.register_hook(lambda gradient: gone.append(inputs[-1]() is None))  # type: ignore[no-untyped-call]
        return torch.sin(inner)

    out = torch.zeros(())
    for _ in range(2):
        with offload.around():
            out = out + checkpoint(block, torch.randn(4, 8), use_reentrant=False).sum()
    out.backward()
    assert len(inputs) == 4
    assert gone == [True, True]


def test_strides_survive() -> None:
    """A channels-last tensor comes back as one; what is not dense is left where it is."""
    offload = ActivationOffload(DelayedTransfers())
    seen: list[tuple[int, ...]] = []

    def block(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        seen.append((a.stride(), b.stride(), c.stride()))  # type: ignore[arg-type]
        return a * b.exp() * c

    a = torch.randn(2, 3, 4, 5, requires_grad=True)
    b = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    c = torch.randn(2, 1, 4, 5).expand(2, 3, 4, 5)
    with offload.around():
        out = checkpoint(block, a, b, c, use_reentrant=False)
    out.sum().backward()
    assert seen[0] == seen[1]
    torch.testing.assert_close(a.grad, b.detach().exp() * c)


def test_host_buffers_grow_to_the_largest_bucket_and_stay() -> None:
    transfers = DelayedTransfers()
    chain = _Chain(transfers)
    for rows in (8, 10, 6, 10, 8):
        x = torch.randn(rows, 16)
        assert _same(chain.gradients(x), chain.gradients(x, offloaded=False))
    assert [memory.nbytes for memory in chain.offload._memory] == [10 * 16 * 4] * BLOCKS
    assert transfers.host_bytes == BLOCKS * (8 + 10) * 16 * 4


def test_two_passes_before_their_backwards() -> None:
    chain = _Chain(DelayedTransfers())
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    truth = [
        a + b
        for a, b in zip(chain.gradients(x, offloaded=False), chain.gradients(y, offloaded=False), strict=True)
    ]
    chain.blocks.zero_grad(set_to_none=True)
    first, second = chain.forward(x), chain.forward(y)
    first.square().sum().backward()
    second.square().sum().backward()
    for measured, expected in zip(chain.blocks.parameters(), truth, strict=True):
        torch.testing.assert_close(measured.grad, expected)


def test_a_pass_that_never_goes_back_leaves_nothing() -> None:
    chain = _Chain(DelayedTransfers())
    x = torch.randn(8, 16)
    for _ in range(3):
        chain.forward(x)
        chain.offload.reset()
    with torch.no_grad():
        chain.forward(x)
    assert len(chain.offload._memory) == BLOCKS
    assert _same(chain.gradients(x), chain.gradients(x, offloaded=False))


@pytest.mark.slow
def test_memory_is_flat_over_200_steps() -> None:
    """Weights and inputs streamed: no tensor more after 200 steps, and no garbage collection needed."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    ).train()
    transfers = DelayedTransfers()
    offload = ActivationOffload(transfers)
    WeightStreaming(unet, transfers)
    apply_layout(unet, "split", gradient_checkpointing=True, offload=offload)
    latents, text = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 4)
    found = []
    gc.collect()
    gc.disable()
    try:
        for step in range(200):
            unet(latents, 7, encoder_hidden_states=text).sample.sum().backward()
            unet.zero_grad(set_to_none=True)
            offload.reset()
            if step in (3, 199):
                tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
                found.append((len(tensors), transfers.host_bytes, len(transfers.pending)))
    finally:
        gc.enable()
    assert found[0] == found[1]
    assert len(offload._memory) > 3


def test_large_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapo_fast.engine.offload_activations.OFFLOADED_BYTES", 8 * 16 * 4)
    transfers = DelayedTransfers()
    chain = _Chain(transfers)
    chain.forward(torch.randn(7, 16))
    assert transfers.stored_bytes == 0
    chain.forward(torch.randn(8, 16))
    assert transfers.stored_bytes == BLOCKS * 8 * 16 * 4


def test_evaluation_in_between() -> None:
    unet = make_unet("sdxl")
    truth = run(unet, "sdxl", torch.float64)
    offload = ActivationOffload(DelayedTransfers())
    apply_layout(unet, "joint", gradient_checkpointing=True, offload=offload)
    latents, others = inputs("sdxl", torch.float64)
    out = unet(latents, **others).sample
    with torch.no_grad():
        torch.testing.assert_close(unet(latents, **others).sample, truth["output"], rtol=1e-10, atol=1e-12)
    out.sum().backward()
    assert torch.isfinite(latents.grad).all()  # type: ignore[arg-type]
