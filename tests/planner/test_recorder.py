"""What the recorder predicts without computing, against the allocator's own events of a real step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from mapo_fast.engine import compile as compile_module
from mapo_fast.engine.build import prepare_unet, with_start_model
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import choose_precision
from mapo_fast.planner import trace as planner_trace
from mapo_fast.planner.costs import ATTENTION, CONVOLUTION, ELEMENTWISE, FP8, MATRIX
from mapo_fast.planner.recorder import Recorder, card_path
from mapo_fast.planner.trace import CPU, pairs_of_zeros, record_step
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_kernels import AdamW8bit, add_rounded_, fp8_linear, group_norm_silu_conv
from mapo_kernels.hardware import INTERPRETING, Card
from tests.tiers import some_of

CARD = Card(89, 128)
REDUCED: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 1],
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
}
"""SDXL in small, with 4 million parameters."""
TWO_BLOCKS = REDUCED | {"transformer_layers_per_block": [1, 2]}
"""With two blocks in each transformer."""


def settings(**sections: dict[str, Any]) -> Config:
    table: dict[str, Any] = {
        "model": {"path": "reduced"},
        "data": {"cache": "cache", "resolution": 128},
        "train": {"output": "run", "precision": "fp32"},
        "adapter": {"kind": "full"},
        "optim": {"name": "adamw8bit"},
    }
    for section, values in sections.items():
        table.setdefault(section, {}).update(values)
    return parse_config(table)


PLANS = {
    "plain": {"train": {"layout": "joint", "gradient_checkpointing": False}},
    "checkpointed": {"train": {"layout": "joint"}},
    "split, fused": {"train": {"layout": "split", "fused_step": True}},
    "lora, sequential": {
        "adapter": {"kind": "lora"},
        "train": {"layout": "sequential", "gradient_checkpointing": False},
    },
    "lora, compared with itself switched off": {
        "adapter": {"kind": "lora"},
        "objective": {"name": "dpo"},
        "train": {"layout": "joint", "gradient_checkpointing": False},
    },
    "full, compared with a copy": {
        "objective": {"name": "dpo", "reference": "copy"},
        "train": {"layout": "split", "fused_step": True},
    },
}


def real_peak(config: Config) -> int:
    """Highest allocated bytes of a real step on the CPU, by torch.profiler's allocator events."""
    precision = choose_precision(config, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel

        unets: list[Any] = [
            UNet2DConditionModel.from_config(REDUCED).to(precision.base).train() for _ in range(2)
        ]
    parts = prepare_unet(unets[0], config, precision, CPU)
    parts = with_start_model(parts, config, lambda: unets[1])
    if config.reference != "copy":
        del unets[1]
    engine = Engine(config, parts, build_loss(config.objective, 1000), precision, CPU)
    inputs = pairs_of_zeros(1, config.data.resolution // 8, REDUCED)

    def step() -> None:
        engine.start(1e-5)
        engine.accumulate(inputs, 1.0)
        engine.finish()

    step()  # optimizer states, caches
    states = [
        x
        for s in engine.optimizer.optimizer.state.values()
        for x in s.values()
        if isinstance(x, torch.Tensor)
    ]
    held = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes()
        for x in [*(x for unet in unets for x in (*unet.parameters(), *unet.buffers())), *states, *inputs]
    }
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return sum(held.values()) + peak


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="operators would run in Triton's interpreter")
@pytest.mark.parametrize("name", some_of(PLANS, ("checkpointed", "lora, sequential")))
def test_the_prediction_is_within_three_percent_of_the_allocator(
    name: str,
) -> None:
    """The predicted peak of the eager path, which the CPU runs; the kernels' path allocates otherwise."""
    # Eager AdamW8bit computes in temporaries that no card needs; torch's AdamW does not.
    config = settings(**PLANS[name], optim={"name": "adamw"})
    predicted = record_step(config, REDUCED, kernels=False).peak
    measured = real_peak(config)
    assert predicted == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="operators would run in Triton's interpreter")
@pytest.mark.parametrize("fused_ops", [True, pytest.param(False, marks=pytest.mark.proof)])
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_step_needs_no_more_than_predicted(
    fused_ops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is chosen by the partitioner that inductor has; activations are most of this step."""
    monkeypatch.setattr(compile_module, "BACKEND", "aot_eager")
    config = settings(
        **PLANS["plain"],
        optim={"name": "adamw"},
        data={"resolution": 384},
        speed={"compile": True, "fused_ops": fused_ops},
    )
    predicted = record_step(config, REDUCED, kernels=False)
    assert predicted.row("saved").max() > predicted.peak / 3
    assert predicted.peak > 0.997 * real_peak(config)
    torch._dynamo.reset()


def test_nothing_large_is_computed() -> None:
    x = torch.zeros(300, 300)
    with Recorder([x]) as recorder:
        y = x + 1
        z = torch.zeros(5)
    assert y.shape == x.shape
    assert (z == 0).all()
    assert recorder.live == 2 * 360448 + 512
    del y
    assert recorder.live == 360448 + 512


def test_temporary_memory_inside_an_operator_is_seen() -> None:
    x = torch.empty(2, 64, 64, 64)
    weight = torch.empty(8, 64, 3, 3)
    recorder = Recorder([x, weight])
    before = recorder.live
    with card_path(CARD, recorder), recorder:
        out = group_norm_silu_conv(x, 32, None, None, weight)
    assert recorder.peak - before >= x.nbytes + out.nbytes  # the activation that the convolution reads
    assert recorder.live - before < x.nbytes


@pytest.mark.slow
def test_arithmetic_is_counted_in_every_kind() -> None:
    trace = record_step(settings(**PLANS["plain"]), REDUCED)
    kinds = {kind: trace.flops[trace.kinds == kind].sum() for kind in (MATRIX, CONVOLUTION, ATTENTION)}
    assert all(total > 1e8 for total in kinds.values())
    recomputing = record_step(settings(**PLANS["checkpointed"]), REDUCED)
    assert 1.2 < recomputing.flops.sum() / trace.flops.sum() < 1.4


@pytest.mark.skipif(INTERPRETING, reason="nothing is multiplied in fp8 there")
def test_products_in_fp8_are_counted_apart_with_the_bytes_of_rounding() -> None:
    """Operations of y = x Wᵀ and dx = dy W in fp8, and of dW = dyᵀ x, which is not."""
    rows, width, out = 512, 256, 384
    x, weight = (torch.empty(n, width, requires_grad=True) for n in (rows, out))
    recorder = Recorder([x, weight])
    with card_path(CARD, recorder), recorder:
        fp8_linear(x, weight).sum().backward()
    of = {kind: [c for c in recorder.operations if c.kind == kind] for kind in (FP8, MATRIX, ELEMENTWISE)}
    product = 2.0 * rows * width * out
    assert [c.flops for c in of[FP8]] == [product, product]
    assert [c.flops for c in of[MATRIX]] == [product]
    scales = 4 * (rows + width)  # bytes of an fp8 product: codes, a scale per row of each, bf16 out
    assert of[FP8][1].nbytes == rows * out + width * out + scales + 2 * rows * width
    for n, columns, factors in ((rows, width, 0), (out, width, 0), (rows, out, 4 * out)):
        rounding = 5 * n * columns + 4 * n + factors  # fp32 read, codes and scales written
        assert rounding in [c.nbytes for c in of[ELEMENTWISE]]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="nothing is multiplied in fp8 there")
def test_fp8_layers_move_products_and_nothing_else_to_fp8() -> None:
    lora = {"adapter": {"kind": "lora"}, "train": {"precision": "bf16", "layout": "joint"}}
    dense = record_step(settings(**lora), REDUCED)
    lora["adapter"]["base"] = "fp8"
    eight_bit = record_step(settings(**lora), REDUCED)
    flops = {kind: eight_bit.flops[eight_bit.kinds == kind].sum() for kind in (FP8, MATRIX)}
    assert not dense.flops[dense.kinds == FP8].any()
    assert flops[FP8] > flops[MATRIX]
    assert sum(flops.values()) == pytest.approx(dense.flops[dense.kinds == MATRIX].sum())


@pytest.mark.skipif(INTERPRETING, reason="operators would run in Triton's interpreter")
@pytest.mark.parametrize("max_update_rms", [None, 1.0])
def test_what_8_bit_adamw_moves_is_counted_though_its_kernels_find_it_by_addresses(
    max_update_rms: float | None,
) -> None:
    """A bf16 weight read and written, its gradient read, two codes and two block maxima read and written."""
    numel, small = 1024 * 1024, 100
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (numel, small)]
    optimizer = AdamW8bit(params, max_update_rms=max_update_rms)

    def step() -> None:
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()

    recorder = Recorder(params)
    with card_path(CARD, recorder), recorder:
        step()
        recorder.restart()
        step()
    moments = numel * 2 + numel // 256 * 8 + small * 8
    update = (numel + small) * (2 + 2 + 2) + 2 * moments + 2 * 2 * 8
    clipping = 0 if max_update_rms is None else (numel + small) * 2 + moments
    moved = sum(c.nbytes for c in recorder.operations[recorder.first :])
    assert moved == pytest.approx(update + clipping, rel=0.01)


def test_what_is_changed_in_place_is_read_and_written() -> None:
    x, y = torch.zeros(8192), torch.zeros(8192)
    with Recorder([x, y]) as recorder:
        x.add_(y)
        x.copy_(y)
        torch._foreach_mul_([x, y], 2.0)
        x.zero_()
    assert [c.nbytes / x.nbytes for c in recorder.operations] == [3, 2, 4, 1]


@pytest.mark.skipif(INTERPRETING, reason="operators would run in Triton's interpreter")
def test_what_a_kernel_of_ours_changes_in_place_is_read_and_written() -> None:
    total, summand = (torch.zeros(8192, dtype=torch.bfloat16) for _ in range(2))
    recorder = Recorder([total, summand])
    with card_path(CARD, recorder), recorder:
        add_rounded_(total, summand, seed=0, tensor_id=0, number=0)
    assert sum(c.nbytes for c in recorder.operations) == 3 * total.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "some",
    [
        pytest.param(PLANS["split, fused"], id="full"),
        pytest.param(
            {"adapter": {"kind": "lora"}, "train": {"layout": "joint", "precision": "bf16"}},
            id="LoRA",
            marks=pytest.mark.proof,
        ),
    ],
)
def test_what_only_a_first_step_does_is_in_no_other(
    some: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States and tables of addresses are made once; a step is as long as the one that follows it."""
    config = settings(**some)
    second = record_step(config, REDUCED)
    real = planner_trace.take_step

    def twice(engine: Engine, inputs: Any, *mark: Any) -> None:
        real(engine, inputs)
        real(engine, inputs, *mark)

    monkeypatch.setattr(planner_trace, "take_step", twice)
    assert len(record_step(config, REDUCED).kinds) == 2 * len(second.kinds)
