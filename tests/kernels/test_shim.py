"""The interpreter's stricter rules hold, so that a bf16 mistake in a kernel cannot pass the other tests."""

import pytest
import torch

from mapo_kernels._triton import jit, tl

pytestmark = pytest.mark.usefixtures("_interpreted")


@jit
def _cast(source, result, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(result + i, tl.load(source + i).to(result.dtype.element_ty))


@jit
def _double(source, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    x = tl.load(source + i)
    tl.store(source + i, x + x)


@jit
def _sum(source, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(source, tl.sum(tl.load(source + tl.arange(0, N)), axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bf16_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    source = torch.cat([torch.randn(1021), torch.tensor([float("nan"), float("inf"), 1 + 2**-8])]).to(dtype)
    result = torch.empty(1024, dtype=torch.bfloat16)
    _cast[(1,)](source, result, 1024)
    torch.testing.assert_close(result, source.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(1024, dtype=dtype)
    _cast[(1,)](result, back, 1024)
    torch.testing.assert_close(back, result.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", [_double, _sum])
def test_bf16_arithmetic_raises(kernel: object) -> None:
    with pytest.raises(Exception, match="convert to fp32"):
        kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), 16)  # type: ignore[index]
