"""Additions to bf16 sums that are rounded stochastically: their bits, their mean, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mapo_kernels._rounding import random_bits_torch, round_stochastically_torch
from mapo_kernels.ops.add_rounded import add_rounded_
from mapo_kernels.reference import add_rounded_reference


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (257, 9), (3, 5, 4, 7)])
def test_an_element_has_its_own_bits(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    total = draw(*shape).contiguous(memory_format=order)
    summand = draw(*shape, dtype=dtype, seed=1)  # contiguous: in another order than the total
    in_memory = torch.arange(total.numel()).view(shape) if len(shape) < 4 else None
    if in_memory is None:
        n, c, h, w = shape
        in_memory = torch.arange(total.numel()).view(n, h, w, c).permute(0, 3, 1, 2)
    bits = random_bits_torch(2**40 + 7, 5, 2**62 + 11, total.numel())[in_memory]
    want = round_stochastically_torch(total.float() + summand.float(), bits, torch.bfloat16)
    got = total.clone(memory_format=torch.preserve_format).to(device)
    assert add_rounded_(got, summand.to(device), seed=2**40 + 7, tensor_id=5, number=11) is got
    assert torch.equal(got.cpu(), want)


def test_it_is_right_on_average_and_exact_where_it_can_be(device: str) -> None:
    total, summand = draw(1024), draw(1024, seed=1) / 100
    exact = add_rounded_reference(total, summand)
    rounds = 64
    results = [
        add_rounded_(total.clone().to(device), summand.to(device), seed=3, tensor_id=0, number=i).cpu()
        for i in range(rounds)
    ]
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    error = (torch.stack(results).double() - exact) / spacing
    assert float(error.abs().max()) < 1
    assert float(error.mean(0).abs().max()) < 5 * 0.5 / rounds**0.5
    assert abs(float(error.mean())) < 5 * 0.5 / (rounds * 1024) ** 0.5
    unchanged = add_rounded_(
        total.clone().to(device), torch.zeros(1024, device=device), seed=3, tensor_id=0, number=0
    )
    assert torch.equal(unchanged.cpu(), total)


def test_what_is_not_finite_stays(device: str) -> None:
    largest = torch.finfo(torch.bfloat16).max
    total = torch.tensor(
        [float("inf"), float("nan"), largest, -float("inf")], dtype=torch.bfloat16, device=device
    )
    add_rounded_(total, torch.ones(4, device=device), seed=0, tensor_id=0, number=0)
    assert total[0] == float("inf")
    assert total[1].isnan()
    assert total[2] == largest
    assert total[3] == -float("inf")


def test_what_is_refused(device: str) -> None:
    total = torch.zeros(4, 4, dtype=torch.bfloat16, device=device)
    with pytest.raises(TypeError, match=r"torch\.float32 \+= torch\.float32; needs bf16"):
        add_rounded_(total.float(), total.float(), seed=0, tensor_id=0, number=0)
    with pytest.raises(ValueError, match=r"shapes \(4, 4\) and \(4,\) differ"):
        add_rounded_(total, total[0], seed=0, tensor_id=0, number=0)
    with pytest.raises(ValueError, match="must be dense in memory"):
        add_rounded_(total[:, :2], total[:, 2:], seed=0, tensor_id=0, number=0)
    empty = torch.empty(0, dtype=torch.bfloat16, device=device)
    assert add_rounded_(empty, empty, seed=0, tensor_id=0, number=0) is empty
