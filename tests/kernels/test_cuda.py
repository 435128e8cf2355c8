"""What only a GPU can show: streams, graph replay, no waiting. test_paired_loss.py runs there as well."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mapo_kernels import (
    NoiseTarget,
    PairedLoss,
    backend,
    noise_key,
    paired_loss,
    paired_noise,
    paired_noise_epsilon,
)
from mapo_kernels import _launch as launch
from mapo_kernels.reference import paired_loss_reference
from tests.kernels.pairs import tensors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _counters_end_at_zero() -> Iterator[None]:
    assert backend("cuda").name == "triton"
    yield
    torch.cuda.synchronize()
    assert all(counter.item() == 0 for counter in launch._counters.values())


def batch(pairs: int = 4) -> tuple[Tensor, Tensor]:
    target = torch.randn(2 * pairs, 4, 128, 128, device="cuda")
    return (target + 0.1 * torch.randn_like(target)).to(torch.bfloat16).requires_grad_(), target


def run(prediction: Tensor, target: Tensor) -> tuple[PairedLoss, Tensor]:
    out = paired_loss(prediction, target)
    (grad,) = torch.autograd.grad(out.loss, prediction)
    return out, grad


def equal(a: tuple[PairedLoss, Tensor], b: tuple[PairedLoss, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*tensors(a[0]), a[1]), (*tensors(b[0]), b[1]), strict=True))


@pytest.mark.parametrize("pairs", [1, 4, 64, 200])
def test_ten_thousand_programs_race_to_the_same_bits(pairs: int) -> None:
    prediction, target = batch(pairs)
    first = run(prediction, target)
    truth = paired_loss_reference(prediction, target)
    assert (first[0].logits - truth.logits).abs().max() <= 1e-3
    for _ in range(200):
        assert equal(run(prediction, target), first)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu() -> None:
    prediction, target = batch()
    run(prediction, target)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(prediction, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_do_not_share_a_counter() -> None:
    batches = [batch(16) for _ in range(4)]
    want = [run(*b) for b in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream, b in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(*b))
        torch.cuda.synchronize()
        assert all(equal(a, b) for a, b in zip(got, want, strict=True))


def test_graph_replay_beside_eager_work() -> None:
    prediction, target = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(prediction, target)
    torch.cuda.current_stream().wait_stream(side)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    captured = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(run(prediction, target))
    for _ in range(20):
        with torch.no_grad():
            prediction.copy_(target + 0.1 * torch.randn_like(target))
        torch.cuda.synchronize()
        for graph in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.replay()
        want = run(prediction, target)
        torch.cuda.synchronize()
        assert all(equal(got, want) for got in captured)


def noisy_step(latents: Tensor, keys: Tensor, scales: Tensor) -> tuple[Tensor, PairedLoss, Tensor]:
    """Noise a batch, pretend to denoise it, and take the loss against the target made again."""
    chosen, rejected = latents.chunk(2)
    noisy = paired_noise(chosen, rejected, keys, scales, 1 - scales)
    target = NoiseTarget(keys, "v", (chosen, rejected), scales, 1 - scales)
    prediction = (0.5 * noisy).requires_grad_()
    out = paired_loss(prediction, target)
    return noisy, out, torch.autograd.grad(out.loss, prediction)[0]


def test_the_card_draws_the_same_noise_as_torch() -> None:
    keys = torch.tensor([noise_key(0, 0, str(i)) for i in range(4)])
    zero, one = torch.zeros(4, 4, 128, 128, device="cuda"), torch.ones(4, device="cuda")
    noisy, again = paired_noise(zero, zero, keys.cuda(), one, one).chunk(2)
    assert torch.equal(noisy, again)
    want = paired_noise_epsilon(keys, (4, 128, 128))
    assert ((noisy.cpu() - want).abs() <= 4 * 2**-23 * want.abs().clamp(min=0.1)).all()


def test_a_replayed_graph_takes_new_keys() -> None:
    latents = torch.randn(8, 4, 64, 64, device="cuda").to(torch.bfloat16)
    keys, scales = torch.arange(4, device="cuda"), torch.rand(4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        noisy_step(latents, keys, scales)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy, out, grad = noisy_step(latents, keys, scales)
    for _ in range(3):
        keys.add_(4)
        scales.uniform_()
        graph.replay()
        want = noisy_step(latents, keys, scales)
        assert torch.equal(noisy, want[0])
        assert equal((out, grad), want[1:])


@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_compile_with_cuda_graphs() -> None:
    prediction, target = batch()
    compiled = torch.compile(
        lambda p, t: paired_loss(p * 1.0, t).loss, mode="reduce-overhead", fullgraph=True
    )
    for _ in range(4):
        (got,) = torch.autograd.grad(compiled(prediction, target), prediction)
        assert torch.equal(got, run(prediction, target)[1])
