"""The switches of `[speed]`: whichever are on, the steps are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters

from mapo_fast import MaPOLoss
from mapo_fast.engine import compile as compile_module
from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.compile import CompiledBlocks
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.step import predict
from mapo_fast.models.patch import FusedResnetBlock
from mapo_fast.settings.schema import Config
from tests.engine.pair_steps import pair_of_inputs
from tests.engine.test_engine import CPU, FP64, settings, trained
from tests.engine.test_reference import config_of, engine_of
from tests.unets import DEEP, make_unet

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo's own

PLANS: dict[str, dict[str, Any]] = {
    "joint": {},
    "split": {"layout": "split", "checkpointing": True},
    "fused-8bit": {"optimizer": "adamw8bit", "layout": "split", "checkpointing": True, "fused": True},
    "sequential-lora": {"kind": "lora", "layout": "sequential", "checkpointing": True},
    "streamed": {
        "fused": True,
        "checkpointing": True,
        "states": "cpu",
        "weights": "cpu",
        "activations": "cpu",
    },
}


def with_speed(config: Config, **switches: bool) -> Config:
    return config.model_copy(update={"speed": config.speed.model_copy(update=switches)})


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor takes half a minute a block; what dynamo and autograd make of it is the same here."""
    monkeypatch.setattr(compile_module, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def truth() -> dict[str, dict[str, Tensor]]:
    return {name: trained(settings(**plan)) for name, plan in PLANS.items()}


def assert_same_steps(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        error = (found[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= 1e-10, name


SWITCHES: list[Any] = [
    ("joint", {"channels_last": True}),
    ("joint", {"fused_ops": False}),
    ("split", {"channels_last": True, "fused_ops": False}),
    ("fused-8bit", {"fused_ops": False}),
    ("sequential-lora", {"channels_last": True}),
    ("sequential-lora", {"fused_ops": False}),
    ("streamed", {"channels_last": True}),
    ("streamed", {"fused_ops": False}),
    pytest.param("sequential-lora", {"compile": True, "fused_ops": False}, marks=pytest.mark.proof),
    ("streamed", {"compile": True, "channels_last": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "switches"), SWITCHES, ids=lambda v: v if isinstance(v, str) else "+".join(v)
)
def test_every_switch_takes_the_same_steps(
    truth: dict[str, dict[str, Tensor]], plan: str, switches: dict[str, bool]
) -> None:
    assert_same_steps(trained(with_speed(settings(**PLANS[plan]), **switches)), truth[plan])


@pytest.mark.slow
def test_blocks_are_compiled_once_and_not_for_every_bucket() -> None:
    """Four transformers with two blocks each, all of one width."""
    counters.clear()
    config = with_speed(settings(**PLANS["fused-8bit"]), compile=True)
    truth = prepare_unet(make_unet("sdxl", **DEEP), settings(**PLANS["fused-8bit"]), FP64, CPU)
    parts = prepare_unet(make_unet("sdxl", **DEEP), config, FP64, CPU)
    engines = [Engine(settings(**PLANS["fused-8bit"]), p, MaPOLoss(), FP64, CPU) for p in (truth, parts)]
    for pairs, side in ((3, 8), (3, 8), (2, 16), (4, 12)):
        for engine in engines:
            engine.start(1e-3)
            engine.accumulate(pair_of_inputs(pairs, side=side), 1.0)
            engine.finish()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert parts.compiled is not None
    assert parts.compiled.seconds > 0
    assert_same_steps(parts.state_dict(), truth.state_dict())
    with torch.no_grad():
        predict(parts.unet.eval(), pair_of_inputs())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_training_compiles_for_itself_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is two variants of one code, as many as may be."""
    monkeypatch.setattr(compile_module, "BACKEND", "eager")
    monkeypatch.setattr(compile_module, "VARIANTS", 2)
    listening = len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            blocks = nn.ModuleList(BasicTransformerBlock(width, 1, 8) for width in (8, 16)).to(dtype)
            compiled = CompiledBlocks(blocks)
            for block, width in zip(blocks, (8, 16), strict=True):
                block(torch.zeros(2, 3, width, dtype=dtype))
            assert compiled.seconds > 0
            assert torch._dynamo.config.recompile_limit == 2
            del compiled
        assert torch._dynamo.config.recompile_limit == 1
    assert (len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)) == listening


def other_code(module: Any, _: Any) -> Any:
    """A compiler whose results differ from eager ones, as inductor's do."""
    return lambda *args: [x * (1 + 1e-6) if isinstance(x, Tensor) else x for x in module(*args)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "source", "layout", "graphs"),
    [
        ("full", "copy", "joint", 1),
        ("full", "copy", "sequential", 1),
        ("full", "precomputed", "joint", 1),
        ("full", "copy", "split", 1),
        ("lora", "adapter", "joint", 3),
    ],
)
def test_the_reference_is_compiled_as_the_step_is(
    monkeypatch: pytest.MonkeyPatch, kind: str, source: str, layout: str, graphs: int
) -> None:
    """So there is no margin at the start: to a bit, or in `split`, whose blocks see one half, up to rounding.

    Only a LoRA that is switched off is other code, one graph more.
    """
    monkeypatch.setattr(compile_module, "BACKEND", other_code)
    counters.clear()
    split = layout == "split"
    config = config_of("dpo", kind, source, train={"layout": layout, "gradient_checkpointing": split})
    engine, known = engine_of(with_speed(config, compile=True))
    out = engine.accumulate(pair_of_inputs(), 1.0, reference_errors=known)
    assert counters["stats"]["unique_graphs"] == graphs
    assert out.logits.abs().max() <= 4 * 5000 * torch.finfo(torch.float64).eps * split


@pytest.mark.slow
def test_eight_bit_states_follow_the_weights_into_channels_last() -> None:
    """Their blocks of 256 follow the order in memory, so the states are others, and the step is another."""
    config = with_speed(settings(**PLANS["fused-8bit"]), channels_last=True)
    parts = prepare_unet(make_unet("sdxl"), config, FP64, CPU)
    engine = Engine(config, parts, MaPOLoss(), FP64, CPU)
    engine.start(1e-3)
    engine.accumulate(pair_of_inputs(), 1.0)
    engine.finish()
    weight = parts.unet.mid_block.resnets[0].conv1.weight
    state = engine.optimizer.optimizer.state[weight]["state1"]
    assert state.stride() == weight.stride() != tuple(torch.empty(weight.shape).stride())


@pytest.mark.slow
def test_activations_stay_in_channels_last() -> None:
    """Every image between two layers, in joint and in split, forward and backward."""
    config = with_speed(settings(layout="split", checkpointing=True), channels_last=True)
    unet = prepare_unet(make_unet("sdxl", dtype=torch.float32), config, FP64, CPU).unet
    seen: list[tuple[str, Tensor]] = []
    for name, module in unet.named_modules():
        if isinstance(module, (FusedResnetBlock, nn.Conv2d)):
            module.register_forward_hook(lambda m, a, out, name=name: seen.append((name, out)))
    unet_inputs = pair_of_inputs(dtype=torch.float32)
    out = predict(unet, unet_inputs)
    out.square().sum().backward()
    wrong = [n for n, out in seen if not out.is_contiguous(memory_format=torch.channels_last)]
    assert seen
    assert not wrong
    convolutions = [m.weight for m in unet.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    assert all(w.grad is not None and w.grad.stride() == w.stride() for w in convolutions)


def test_without_fused_operators_the_unet_is_diffusers_own() -> None:
    config = with_speed(settings(), fused_ops=False)
    unet = prepare_unet(make_unet("sdxl"), config, FP64, CPU).unet
    assert not any(type(m).__module__ == "mapo_fast.models.patch" for m in unet.modules())
