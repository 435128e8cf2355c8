"""Every operator under non-reentrant checkpointing, which lets saved tensors be unpacked a single time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mapo_kernels import (
    Lora,
    Projection,
    geglu,
    geglu_linear,
    group_norm_silu,
    group_norm_silu_conv,
    layer_norm,
    layer_norm_linear,
    lora_linear,
    paired_loss,
)

WIDTH, RANK = 8, 2


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


LORA = Lora(parameter(RANK, WIDTH), parameter(WIDTH, RANK), 0.5)
PROJECTION = Projection(parameter(WIDTH, WIDTH), parameter(WIDTH), LORA)
NORM = parameter(WIDTH), parameter(WIDTH)
CONVOLUTION = parameter(6, WIDTH, 3, 3), parameter(6)

OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "geglu": (geglu, (3, 2 * WIDTH)),
    "geglu_linear": (lambda x: geglu_linear(x, PROJECTION), (3, 2 * WIDTH)),
    "layer_norm": (lambda x: layer_norm(x, *NORM), (3, WIDTH)),
    "layer_norm, residual": (lambda x: sum(layer_norm(x, *NORM, residual=x.sin())), (3, WIDTH)),
    "layer_norm_linear": (lambda x: sum(layer_norm_linear(x, *NORM, [PROJECTION] * 2)), (3, WIDTH)),
    "lora_linear": (lambda x: lora_linear(x, PROJECTION.weight, None, *LORA), (3, WIDTH)),
    "group_norm_silu": (lambda x: group_norm_silu(x, 2, *NORM), (2, WIDTH, 4, 4)),
    "group_norm_silu_conv": (lambda x: group_norm_silu_conv(x, 2, *NORM, *CONVOLUTION), (2, WIDTH, 4, 4)),
    "paired_loss": (lambda x: paired_loss(x, torch.zeros_like(x)).loss, (4, WIDTH)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_gradients(name: str) -> None:
    operator, shape = OPERATORS[name]
    x = parameter(*shape)
    leaves = [x, *NORM, PROJECTION.weight, LORA.a, LORA.b, *CONVOLUTION]
    plain, recomputed = (
        torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        for out in (operator(x), checkpoint(operator, x, use_reentrant=False))
    )
    assert plain[0] is not None
    for want, got in zip(plain, recomputed, strict=True):
        assert (want is None) == (got is None)
        assert want is None or torch.equal(want, got)


@pytest.mark.parametrize("name", OPERATORS)
def test_no_zeros_are_made_for_outputs_without_a_gradient(name: str) -> None:
    operator, shape = OPERATORS[name]
    out = operator(parameter(*shape))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.backward(torch.ones_like(out))
    assert not [event for event in profile.events() if event.name == "aten::zeros"]
