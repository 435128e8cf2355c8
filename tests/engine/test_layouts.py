"""`joint` and `split` give the same gradients; `split` needs less memory inside a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.live_memory import LiveMemory
from mapo_fast import MaPOLoss
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.model import open_sdxl
from tests.tiny import POOLED_WIDTH, TEXT_WIDTH

PAIRS = 3


@pytest.fixture(scope="module")
def unet(tiny_sdxl: Path) -> Any:
    return open_sdxl(tiny_sdxl).load_unet(torch.float64).train()


@pytest.fixture(scope="module")
def single(tiny_sdxl: Path) -> Any:
    return open_sdxl(tiny_sdxl).load_unet(torch.float32).train()


def _inputs(dtype: torch.dtype, side: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    embeds, pooled = draw(PAIRS, 77, TEXT_WIDTH + POOLED_WIDTH), draw(PAIRS, POOLED_WIDTH)
    steps = torch.randint(0, 1000, (PAIRS,), generator=generator)
    return {
        "sample": draw(2 * PAIRS, 4, side, side),
        "timestep": torch.cat([steps, steps]),
        "encoder_hidden_states": torch.cat([embeds, embeds]),
        "added_cond_kwargs": {
            "text_embeds": torch.cat([pooled, pooled]),
            "time_ids": torch.full((2 * PAIRS, 6), 64.0),
        },
    }


def _gradients(unet: Any, inputs: dict[str, Any], upstream: Tensor | None) -> dict[str, Tensor]:
    """Gradients of MaPO, or of Σ upstream · prediction where `upstream` is given."""
    unet.zero_grad(set_to_none=True)
    prediction = unet(**inputs).sample
    if upstream is None:
        target = torch.randn(
            prediction.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        MaPOLoss()(prediction, target.to(prediction.dtype)).loss.backward()
    else:
        prediction.backward(upstream)
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def _relative(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert gradients.keys() == truth.keys()
    return {
        name: float((gradients[name].double() - truth[name]).norm() / truth[name].norm())
        for name in truth
        if truth[name].norm() > 0
    }


def test_split_equals_joint_and_no_checkpointing_in_fp64(unet: Any) -> None:
    inputs = _inputs(torch.float64)
    apply_layout(unet, "joint", gradient_checkpointing=False)
    truth = _gradients(unet, inputs, None)
    assert len(truth) > 100
    for layout in ("joint", "split"):
        apply_layout(unet, layout, gradient_checkpointing=True)
        assert max(_relative(_gradients(unet, inputs, None), truth).values()) <= 1e-10


def test_split_is_as_exact_as_joint_in_fp32(unet: Any, single: Any) -> None:
    """At the same upstream gradient, since MaPO's T = 1000 would amplify single ulps of the errors."""
    generator = torch.Generator().manual_seed(9)
    inputs = _inputs(torch.float64)
    upstream = torch.randn(inputs["sample"].shape, generator=generator, dtype=torch.float64)
    apply_layout(unet, "joint", gradient_checkpointing=False)
    truth = _gradients(unet, inputs, upstream)
    errors = {}
    for layout in ("joint", "split"):
        apply_layout(single, layout, gradient_checkpointing=True)
        found = _relative(_gradients(single, _inputs(torch.float32), upstream.float()), truth)
        errors[layout] = sum(found.values()) / len(found)
    assert 0 < errors["split"] <= 2 * errors["joint"]


def test_split_and_joint_agree_through_the_loss_in_fp32(single: Any) -> None:
    inputs = _inputs(torch.float32)
    apply_layout(single, "joint", gradient_checkpointing=True)
    truth = _gradients(single, inputs, None)
    apply_layout(single, "split", gradient_checkpointing=True)
    assert max(_relative(_gradients(single, inputs, None), truth).values()) <= 1e-4


def test_gradient_hooks_fire_once_per_parameter(unet: Any) -> None:
    apply_layout(unet, "split", gradient_checkpointing=True)
    fired: dict[str, int] = {}
    handles = []
    for name, parameter in unet.named_parameters():

        def count(_: Tensor, name: str = name) -> None:
            fired[name] = fired.get(name, 0) + 1

        handles.append(parameter.register_post_accumulate_grad_hook(count))
    _gradients(unet, _inputs(torch.float64), None)
    for handle in handles:
        handle.remove()
    assert set(fired.values()) == {1}


def test_split_halves_the_memory_inside_a_block(single: Any) -> None:
    """One checkpointed transformer block: what backward holds beyond its input and output gradients."""
    block = single.mid_block.attentions[0].transformer_blocks[0]
    width = block.norm1.weight.shape[0]
    hidden = torch.randn(2 * PAIRS, 256, width, requires_grad=True)
    context = torch.randn(2 * PAIRS, 77, TEXT_WIDTH + POOLED_WIDTH)
    peaks = {}
    for layout in ("joint", "split"):
        apply_layout(single, layout, gradient_checkpointing=True)
        transformer = single.mid_block.attentions[0]
        run = transformer._gradient_checkpointing_func
        with LiveMemory([hidden, context, *block.parameters()]) as memory:
            out = run(block, hidden, None, context)
            before = memory.live
            memory.peak = before
            out.sum().backward()
        peaks[layout] = memory.peak - before
        hidden.grad = None
        block.zero_grad(set_to_none=True)
    assert peaks["split"] < 0.65 * peaks["joint"]


def test_split_without_checkpointing_is_refused(unet: Any) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing must be on"):
        apply_layout(unet, "split", gradient_checkpointing=False)


def test_split_refuses_an_odd_batch(unet: Any) -> None:
    apply_layout(unet, "split", gradient_checkpointing=True)
    inputs = _inputs(torch.float64)
    odd = {key: value[:5] for key, value in inputs.items() if isinstance(value, Tensor)}
    odd["added_cond_kwargs"] = {key: value[:5] for key, value in inputs["added_cond_kwargs"].items()}
    with pytest.raises(ValueError, match="batch of 5 samples"):
        unet(**odd)
