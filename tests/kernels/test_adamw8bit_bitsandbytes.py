"""bitsandbytes' AdamW8bit and ours, side by side on the CPU, bit for bit."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mapo_kernels.hardware import Backend
from mapo_kernels.ops import _dynamic_code as book
from mapo_kernels.ops.adamw8bit import AdamW8bit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from bitsandbytes.functional import create_dynamic_map

op = sys.modules["mapo_kernels.ops.adamw8bit"]

SHAPES = [(80, 64), (16, 8, 9, 9), (13,), (4096,), (4095,), (5000,), (1,)]
STATES = ("state1", "state2", "absmax1", "absmax2")


def ordinary(shape: tuple[int, ...], step: int) -> Tensor:
    return 1e-3 * torch.randn(shape)


def adversarial(shape: tuple[int, ...], step: int) -> Tensor:
    """Forty decades, zeros, whole blocks of zeros, subnormals; overflow to Inf in fp16 and NaN after it."""
    grad = torch.randn(shape) * 10 ** (40 * torch.rand(shape) - 30)
    flat = grad.view(-1)
    flat[::7] = 0
    flat[5::11] = 1e-42 * flat[5::11].sign()
    if step % 2:
        flat[:300] = 0
    return grad.clamp(-1e30, 1e30)


@pytest.fixture(autouse=True)
def _reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "backend", lambda device: Backend("eager", "bitsandbytes is compared with that"))


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


@pytest.mark.slow
@pytest.mark.parametrize("switch", [0, 3], ids=["from the start", "loaded in the middle"])
@pytest.mark.parametrize("gradients", [ordinary, adversarial])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_is_equal(dtype: torch.dtype, gradients: Callable[..., Tensor], switch: int) -> None:
    theirs = [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in SHAPES]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-2}
    reference = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-3, **settings)
    optimizer = AdamW8bit(ours, lr=1e-3, stochastic_rounding=False, **settings)
    for step in range(7):
        if switch and step == switch:
            optimizer.load_state_dict(reference.state_dict())
        for p, q in zip(theirs, ours, strict=True):
            p.grad = gradients(p.shape, step).to(dtype)
            q.grad = p.grad.clone()
        reference.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        reference.step()
        if step < switch:
            with torch.no_grad():
                for p, q in zip(theirs, ours, strict=True):
                    q.copy_(p)
            continue
        optimizer.step()
        for p, q in zip(theirs, ours, strict=True):
            assert same(p.detach(), q.detach())
            state = reference.state[p]
            assert int(optimizer.state[q]["step"]) == state["step"] == step + 1
            assert all(same(state[key], optimizer.state[q][key]) for key in STATES if key in state)
            assert {key for key in state if key != "step"} == {
                key for key in optimizer.state[q] if key != "step"
            }


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_is_theirs(signed: bool) -> None:
    assert torch.equal(book.code_book(signed, torch.device("cpu")), create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_their_cpu_library_rounds_to_16_bits_first(signed: bool) -> None:
    """What `cpu_code` repeats, and by how much it misses the nearest code at most."""
    x = torch.cat([torch.linspace(-1 if signed else 0, 1, 65536), 10 ** (-9 * torch.rand(65536))])
    x[::256] = 1.0  # each block's largest
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise(x, create_dynamic_map(signed), 256)
    assert torch.equal(book.cpu_code(x, signed), theirs)
    values = create_dynamic_map(signed).double()
    nearest = (values[book.nearest_code(x, signed).long()] - x.double()).abs()
    assert float(((values[theirs.long()] - x.double()).abs() - nearest).max()) <= 2**-15
    zero = values[int(book.cpu_code(torch.zeros(1), signed))]
    assert 1.4e-5 < float(zero) < 2.2e-5


def test_what_cannot_be_loaded_is_named() -> None:
    p = nn.Parameter(torch.randn(8, 8, 9, 9).to(memory_format=torch.channels_last))
    reference = bitsandbytes.optim.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    reference.step()
    for key, value, message in (
        ("", None, "bitsandbytes' state1 has strides .* order of its blocks"),
        ("qmap2", torch.zeros(256), "qmap2 is not the dynamic 8-bit map"),
    ):
        q = nn.Parameter(p.detach().clone())
        q.grad = torch.ones_like(q)
        optimizer = AdamW8bit([q])
        optimizer.load_state_dict(reference.state_dict())
        if key:
            optimizer.state[q][key] = value
            optimizer.state[q]["state1"] = optimizer.state[q]["state1"].contiguous()
        with pytest.raises(ValueError, match=message):
            optimizer.step()
