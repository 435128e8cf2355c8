"""`joint` and `split` give the same gradients, whatever is checkpointed; `split` needs less memory inside."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from bench.live_memory import LiveMemory
from mapo_fast import MaPOLoss
from mapo_fast.engine import layouts
from mapo_fast.engine.layouts import apply_layout, checkpoint_blocks
from mapo_fast.engine.step import predict
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.patch import patch_unet
from mapo_fast.util.errors import UserError
from tests import unets
from tests.engine.pair_steps import (
    MODELS,
    SOME_BLOCKS,
    add_lora,
    gradients,
    joint_backward,
    pair_of_inputs,
    worst,
)
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


@pytest.mark.slow
def test_split_equals_joint_and_no_checkpointing_in_fp64(unet: Any) -> None:
    inputs = _inputs(torch.float64)
    apply_layout(unet, "joint", gradient_checkpointing=False)
    truth = _gradients(unet, inputs, None)
    assert len(truth) > 100
    for layout in ("joint", "split"):
        apply_layout(unet, layout, gradient_checkpointing=True)
        assert max(_relative(_gradients(unet, inputs, None), truth).values()) <= 1e-10


@pytest.mark.slow
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


# --- Per block ---


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize(("kind", "patched", "checkpointing"), [m for m in MODELS if m[2]], ids=str)
def test_every_model(kind: str, patched: bool, checkpointing: Any, layout: Any) -> None:
    model, inputs = unets.make_unet("sdxl"), pair_of_inputs()
    if kind == "lora":
        add_lora(model)
    truth = gradients(model, lambda: joint_backward(model, inputs, MaPOLoss()))
    if patched:
        patch_unet(model)
    apply_layout(model, layout, gradient_checkpointing=checkpointing)
    assert worst(gradients(model, lambda: joint_backward(model, inputs, MaPOLoss())), truth) <= 1e-10


@pytest.mark.parametrize("family", unets.FAMILIES)
def test_blocks_are_what_diffusers_hands_over(family: str) -> None:
    model = unets.make_unet(family, **unets.DEEP)
    seen = []

    def recorded(block: Any, *args: Any) -> Any:
        seen.append(block)
        return block(*args)

    model.enable_gradient_checkpointing(recorded)
    latents, others = unets.inputs(family, torch.float64)
    model(latents, **others)
    blocks = checkpoint_blocks(model)
    assert set(seen) == set(blocks.values())
    assert len(seen) == len(blocks)
    assert all(model.get_submodule(name) is block for name, block in blocks.items())


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "calls"), [("joint", 2), ("split", 4)])
@pytest.mark.parametrize("copied", [False, True])
def test_only_the_named_blocks_are_recomputed(layout: Any, calls: int, copied: bool) -> None:
    """The others run once, with both halves; a copy of the UNet makes the same choice."""
    model = unets.make_unet("sdxl")
    apply_layout(model, layout, gradient_checkpointing=SOME_BLOCKS)
    if copied:
        model = copy.deepcopy(model)
    ran: Counter[str] = Counter()
    blocks = checkpoint_blocks(model)
    for name, block in blocks.items():

        def count(*_: Any, name: str = name) -> None:
            ran[name] += 1

        block.register_forward_pre_hook(count)
    joint_backward(model, pair_of_inputs(), MaPOLoss())
    assert ran == {name: calls if name.startswith(SOME_BLOCKS) else 1 for name in blocks}
    assert len(set(ran.values())) == 2


def test_a_name_is_not_the_beginning_of_another() -> None:
    model = unets.make_unet("sdxl")
    apply_layout(model, "joint", gradient_checkpointing=("up_blocks.0.resnets.1",))
    runner = model.mid_block._gradient_checkpointing_func
    assert runner.checkpointed == {model.up_blocks[0].resnets[1]}
    with pytest.raises(UserError, match=r"'up_blocks\.0\.res' names no block"):
        apply_layout(model, "joint", gradient_checkpointing=("up_blocks.0.res",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("down_block.1", "did you mean .*down_blocks.1"),
        ("mid_block.resnets.0", "did you mean .*mid_block.resnets.1"),
        ("x", "names start with down_blocks, mid_block, up_blocks$"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_layout(unets.make_unet("sdxl"), "joint", gradient_checkpointing=("down_blocks.0", name))


# --- The norm in front of a transformer's blocks ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_projection_reads_is_recomputed_where_it_would_be_saved(kind: str) -> None:
    """One tensor a transformer less, and the norm run twice; a frozen projection saves nothing anyway."""
    model, inputs = unets.make_unet("sdxl"), pair_of_inputs(side=32)
    if kind == "lora":
        add_lora(model)
    normed: list[Tensor] = []

    def saved_bytes() -> int:
        normed.clear()
        with LiveMemory([*model.parameters(), *inputs]) as memory:
            before = memory.live
            loss = MaPOLoss()(predict(model, inputs), inputs.target).loss
            saved = memory.live - before
            loss.backward()
        return saved

    plain = saved_bytes()
    apply_layout(model, "joint", gradient_checkpointing=False)
    transformers = [m for m in model.modules() if isinstance(m, Transformer2DModel)]
    for transformer in transformers:
        transformer.norm.register_forward_hook(lambda *args: normed.append(args[2].nbytes))
    less = plain - saved_bytes()
    if kind == "lora":
        assert less == 0
        assert len(normed) == len(transformers)
    else:
        statistics = 2 * 512 * len(transformers)  # mean and rstd, as allocated
        assert 2 * less == sum(normed) + 2 * statistics
        assert len(normed) == 2 * len(transformers)


# --- Dropout, offload ---


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("lora", [False, True], ids=["dropout", "lora_dropout"])
def test_recomputed_dropout_drops_the_same(layout: Any, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = unets.make_unet("sdxl"), pair_of_inputs()
    if lora:
        add_lora(model, dropout=0.3)
    else:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    apply_layout(model, layout, gradient_checkpointing=True)
    torch.manual_seed(5)
    found = gradients(model, lambda: joint_backward(model, inputs, MaPOLoss()))
    monkeypatch.setattr(layouts, "checkpoint", lambda block, *args, **_: block(*args))
    torch.manual_seed(5)
    assert worst(found, gradients(model, lambda: joint_backward(model, inputs, MaPOLoss()))) <= 1e-10


class SavedInputs:
    """Stands where an `ActivationOffload` would; counts what is saved for the checkpoints around it."""

    def __init__(self) -> None:
        self.entered = self.saved = self.unpacked = 0

    @contextmanager
    def around(self) -> Iterator[None]:
        self.entered += 1
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        self.saved += 1
        return tensor.clone()

    def _unpack(self, tensor: Tensor) -> Tensor:
        self.unpacked += 1
        return tensor


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "halves"), [("joint", 1), ("split", 2)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_inputs_of_checkpoints_pass_through_the_offload(layout: Any, halves: int, lora: bool) -> None:
    """Two tensors a block, those of the checkpointed blocks only, and not in front of the first adapter."""
    model, inputs, offload = unets.make_unet("sdxl"), pair_of_inputs(), SavedInputs()
    if lora:
        add_lora(model)
    truth = gradients(model, lambda: joint_backward(model, inputs, MaPOLoss()))
    names = (*SOME_BLOCKS, "down_blocks.0")
    apply_layout(model, layout, gradient_checkpointing=names, offload=offload)
    assert worst(gradients(model, lambda: joint_backward(model, inputs, MaPOLoss())), truth) <= 1e-10
    blocks = [name for name in checkpoint_blocks(model) if name.startswith(names)]
    frozen = [name for name in blocks if lora and name.startswith("down_blocks.0")]
    assert offload.entered == halves * (len(blocks) - len(frozen))
    assert offload.saved == offload.unpacked == 2 * offload.entered
