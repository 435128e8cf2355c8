"""Every objective with every kind of reference: gradients of the published formulas, plainly written."""

from __future__ import annotations

import functools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from mapo_fast.data.cache import CachedPair
from mapo_fast.engine import offload_activations, reference, stream_states, stream_weights
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.build import TrainingUnet, prepare_unet, with_start_model
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.reference import PrecomputedErrors, StartModel
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.models.lora import add_lora, lora_state_dict
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from tests.engine.pair_steps import gradients, pair_of_inputs, worst
from tests.engine.test_no_sync import no_sync
from tests.unets import make_unet

FP64 = Precision(torch.float64, torch.float64, None, scaled=False)
CPU = torch.device("cpu")
LABELS = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
WITHOUT = ("mapo", "sft", "orpo", "simpo", "cpo")
WITH = ("dpo", "smpo", "ipo", "hinge", "dmpo", "linear_dpo", "npo")
BETA = {"mapo": 0.1, "orpo": 0.1, "simpo": 250, "cpo": 250, "dmpo": 6000, "linear_dpo": 500, "npo": 2000}
KINDS = (("lora", "adapter"), ("full", "copy"), ("full", "precomputed"))


def config_of(objective: str, kind: str = "full", reference: str = "auto", **sections: Any) -> Config:
    return parse_config(
        {
            "model": {"path": "unused"},
            "data": {"cache": "unused"},
            "objective": {"name": objective, "reference": reference},
            "adapter": {"kind": kind, "rank": 4},
            "optim": {"lr": 1e-4, "max_grad_norm": 0.0},
            **sections,
            "train": {
                "output": "unused",
                "precision": "fp32",
                "layout": "joint",
                "gradient_checkpointing": False,
                **sections.get("train", {}),
            },
        }
    )


def published(name: str, e_w: Tensor, e_l: Tensor, r_w: Tensor, r_l: Tensor) -> Tensor:
    """Per pair, as the papers and the released code write it, with the defaults of these."""
    if name == "npo":
        e_w, e_l, r_w, r_l = e_l, e_w, r_l, r_w
    beta = BETA.get(name, 5000)
    delta = (e_w - r_w) - (e_l - r_l)
    u = -0.5 * beta * delta
    if name == "mapo":
        s_w, s_l = (0.5 * e / torch.expm1(0.5 * e) for e in (e_w, e_l))
        return e_w - beta * logsigmoid(1000 * (s_w - s_l))
    if name == "sft":
        return e_w
    if name in ("dpo", "npo"):
        return -logsigmoid(u)
    if name == "smpo":
        return -logsigmoid(u * 10 * (2 * LABELS - 1))
    if name == "ipo":
        return (-delta - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return torch.relu(1 + beta * delta)
    if name == "dmpo":
        p, q = torch.sigmoid(u), torch.tensor(1 - 0.01, dtype=u.dtype)
        return p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())
    if name == "linear_dpo":
        return (0.2 * beta * delta + 0.5).clamp(0.001, 0.999).detach() * (e_w - e_l)
    if name == "orpo":
        return e_w - beta * logsigmoid(e_l - e_w)
    plain = -logsigmoid(beta * (e_l - e_w) - (0.5 if name == "simpo" else 0.0))
    return plain + e_w if name == "cpo" else plain


def moved(unet: Any) -> None:
    """Move what is trained so little from the start that no sigmoid saturates at β = 5000."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(unet.named_parameters()):
            if p.requires_grad and "lora_A" not in name:
                p.add_(3e-5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@cache
def plain_gradients(objective: str, kind: str) -> dict[str, Tensor]:
    """diffusers' UNet, a second frozen one, autograd."""
    unet, frozen, inputs = make_unet("sdxl"), make_unet("sdxl").requires_grad_(False), pair_of_inputs()
    if kind == "lora":
        add_lora(
            unet,
            rank=4,
            alpha=4.0,
            targets=("to_q", "to_k", "to_v", "to_out.0"),
            seed=0,
            dtype=torch.float64,
        )
    moved(unet)

    def backward() -> None:
        e, r = (
            (predict(model, inputs) - inputs.target).square().mean((1, 2, 3)).chunk(2)
            for model in (unet, frozen)
        )
        published(objective, *e, *r).mean().backward()

    return gradients(unet, backward)


def engine_of(config: Config) -> tuple[Engine, Tensor | None]:
    """An engine at the start, and the start model's errors where they are precomputed."""
    parts = prepare_unet(make_unet("sdxl"), config, FP64, CPU)
    parts = with_start_model(parts, config, lambda: make_unet("sdxl"))
    engine = Engine(config, parts, build_loss(config.objective, 1000), FP64, CPU)
    if config.reference == "precomputed":
        return engine, engine.errors_of(StartModel(parts.unet), pair_of_inputs())
    return engine, None


def named_gradients(parts: TrainingUnet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parts.unet.named_parameters() if p.grad is not None}


def labels_of(config: Config) -> Tensor | None:
    return LABELS if config.objective.known.labels == "required" else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "kind", "source"),
    [(name, "full", "auto") for name in WITHOUT] + [(name, *kind) for name in WITH for kind in KINDS],
)
def test_gradients_are_those_of_the_published_formula(objective: str, kind: str, source: str) -> None:
    config = config_of(objective, kind, source)
    engine, known = engine_of(config)
    moved(engine.unet)
    out = engine.accumulate(pair_of_inputs(), 1.0, reference_errors=known, labels=labels_of(config))
    assert out.logits.abs().max() < 300, "nothing may hide behind a saturated sigmoid"
    assert out.logits.abs().min() > 0
    assert worst(named_gradients(engine.parts), plain_gradients(objective, kind)) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "split", "sequential"])
@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_the_start_model_has_no_margin(kind: str, source: str, layout: str) -> None:
    """Otherwise β would multiply a rounding error. Nor does the reference leave a graph.

    In `split` blocks see one half and the reference's both, so there rounding may differ.
    """
    checkpointing = layout == "split"
    rounding = 5000 * torch.finfo(torch.float64).eps if layout == "split" else 0.0
    config = config_of("dpo", kind, source, train={"layout": layout, "gradient_checkpointing": checkpointing})
    engine, known = engine_of(config)
    out = engine.accumulate(pair_of_inputs(), 1.0, reference_errors=known)
    assert out.logits.abs().max() <= 4 * rounding
    assert out.chosen_reference_error is not None
    assert not out.chosen_reference_error.requires_grad


@pytest.mark.slow
def test_a_lora_that_is_switched_off_is_the_start_model() -> None:
    config = config_of("dpo", "lora")
    engine, _ = engine_of(config)
    start = engine.parts.start
    assert start is not None
    before = start.errors(pair_of_inputs(), FP64.context(CPU))
    for name, factor in lora_state_dict(engine.unet).items():
        if "lora_B" in name:
            factor.normal_()
    assert torch.equal(start.errors(pair_of_inputs(), FP64.context(CPU)), before)
    inputs = pair_of_inputs()
    plain = (predict(make_unet("sdxl"), inputs) - inputs.target).square().mean((1, 2, 3))
    torch.testing.assert_close(before, plain.detach(), rtol=1e-12, atol=0)
    switched_on = (predict(engine.unet, inputs) - inputs.target).square().mean((1, 2, 3))
    assert ((switched_on - before).abs() > 1e-3).all()


# --- With everything else that a step may be made of ---

AWAY = {"optimizer": "cpu", "weights": "cpu", "activations": "cpu"}
PLANS: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    ("lora", "adapter", {"layout": "split", "gradient_checkpointing": True}, {}),
    ("lora", "adapter", {"layout": "sequential"}, {"weights": "cpu"}),
    (
        "lora",
        "adapter",
        {"layout": "split", "gradient_checkpointing": True, "fused_step": True},
        AWAY,
    ),
    ("full", "copy", {"layout": "sequential", "gradient_checkpointing": True}, {"activations": "cpu"}),
    ("full", "copy", {"fused_step": True}, {"optimizer": "cpu", "weights": "cpu"}),
    ("full", "copy", {"layout": "split", "gradient_checkpointing": True, "fused_step": True}, AWAY),
    ("full", "precomputed", {"layout": "split", "gradient_checkpointing": True, "fused_step": True}, AWAY),
]


def trained(config: Config, *, micro_batches: int = 1) -> dict[str, Tensor]:
    engine, known = engine_of(config)
    for _ in range(3):
        engine.start(1e-4)
        for _ in range(micro_batches):
            engine.accumulate(pair_of_inputs(), 1 / micro_batches, reference_errors=known)
        engine.finish()
    engine.parts.transfers.synchronize()
    return {name: w.clone() for name, w in engine.parts.state_dict().items()}


@functools.cache
def start_models_errors_known(kind: str) -> dict[str, Tensor]:
    return trained(config_of("dpo", kind, "precomputed"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "source", "train", "offload"), PLANS)
def test_all_plans_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, kind: str, source: str, train: dict[str, Any], offload: dict[str, str]
) -> None:
    monkeypatch.setattr(stream_weights, "STREAMED_BYTES", 1)
    monkeypatch.setattr(stream_states, "_SMALLEST", 1)
    monkeypatch.setattr(offload_activations, "OFFLOADED_BYTES", 1)
    truth = start_models_errors_known(kind)
    found = trained(config_of("dpo", kind, source, train=train, offload=offload))
    for tensor, expected in truth.items():
        error = (found[tensor] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= 1e-10, tensor


@pytest.mark.slow
def test_accumulated_micro_batches_have_the_lora_on() -> None:
    config = config_of("dpo", "lora", train={"accumulation": 2})
    truth, found = trained(config_of("dpo", "lora")), trained(config, micro_batches=2)
    assert all((found[n] - truth[n]).norm() <= 1e-10 * truth[n].norm().clamp(min=1e-6) for n in truth)


# --- Errors on disk ---


def batches(pairs: int = 5) -> MicroBatches:
    return MicroBatches([CachedPair(f"{i:032x}", (8, 8), i) for i in range(pairs)], 2, seed=0)


def fill(errors: PrecomputedErrors, seen: list[int], stop_after: int = 10**9) -> None:
    """Position p has the errors p, p + ¼, ….; three micro-batches in five pairs, the last of one."""

    def of(position: int) -> Tensor:
        _, pairs = batches().at(position)
        seen.append(position)
        return position + torch.arange(2 * len(pairs)) / 4

    made = errors.compute(map(of, errors.positions()))
    for count, _ in enumerate(made, start=1):
        if count == stop_after:
            made.close()


def opened(folder: Path, count: int = 10, **identity: Any) -> PrecomputedErrors:
    return PrecomputedErrors(folder, {"seed": 0, **identity}, batches(), count, CPU)


def check(errors: PrecomputedErrors, count: int) -> None:
    assert errors.missing == 0
    for position in range(count):
        pairs = len(batches().at(position)[1])
        assert torch.equal(errors.at(position, pairs), position + torch.arange(2 * pairs) / 4)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PART", 4)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    seen: list[int] = []
    fill(opened(tmp_path), seen, stop_after=6)
    assert seen == list(range(6))
    again = opened(tmp_path)
    assert again.missing == 4
    fill(again, seen)
    assert seen == list(range(10))
    check(again, 10)
    check(opened(tmp_path), 10)


@pytest.mark.usefixtures("small_parts")
def test_a_longer_run_adds_and_a_shorter_one_keeps(tmp_path: Path) -> None:
    fill(opened(tmp_path), seen := [])
    check(opened(tmp_path, 5), 5)
    longer = opened(tmp_path, 13)
    fill(longer, seen)
    assert seen == list(range(13))
    check(opened(tmp_path, 13), 13)


@pytest.mark.usefixtures("small_parts")
def test_errors_of_another_run_or_damaged_ones_are_made_again(tmp_path: Path) -> None:
    fill(opened(tmp_path), [])
    assert opened(tmp_path, seed=1).missing == 10
    path = tmp_path / "errors-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert opened(tmp_path).missing == 4
    path.write_bytes(content[:20])
    assert opened(tmp_path).missing == 4
    save_file(load_file(tmp_path / "errors-000000.safetensors"), path)
    again = opened(tmp_path)
    assert again.missing == 4
    assert again.refused == [f"{path} does not match its checksum"]
    fill(opened(tmp_path), seen := [])
    assert seen == [4, 5, 6, 7]
    check(opened(tmp_path), 10)


@pytest.mark.usefixtures("small_parts")
def test_exchanged_files_are_made_again(tmp_path: Path) -> None:
    fill(opened(tmp_path), [])
    one, other = (tmp_path / f"errors-00000{i}.safetensors" for i in (0, 1))
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    again = opened(tmp_path)
    assert again.missing == 8
    assert ["is another file under this name" in reason for reason in again.refused] == [True, True]
    fill(again, [])
    check(opened(tmp_path), 10)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_the_host_reads_no_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, source: str
) -> None:
    engine, known = engine_of(config_of("dpo", kind, source))
    inputs = pair_of_inputs()
    table = PrecomputedErrors(tmp_path, {}, MicroBatches([], 3, seed=0), 1, CPU)
    if known is not None:
        list(table.compute(iter([known])))
    with no_sync(monkeypatch):
        given = None if known is None else table.at(0, 3)
        engine.accumulate(inputs, 1.0, reference_errors=given)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_nobody_waits_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, source: str
) -> None:
    """A step with a streamed copy, with the LoRA switched off, or with errors from pinned memory."""
    monkeypatch.setattr(stream_weights, "STREAMED_BYTES", 1)
    cuda, precision = torch.device("cuda"), Precision(torch.float32, torch.float32, None, scaled=False)
    away = {"weights": "cpu", "optimizer": "cpu"} if source == "copy" else {}
    train = {"fused_step": source == "copy"}
    config = config_of("dpo", kind, source, train=train, offload=away)
    parts = prepare_unet(make_unet("sdxl", dtype=torch.float32), config, precision, cuda)
    parts = with_start_model(parts, config, lambda: make_unet("sdxl", dtype=torch.float32))
    engine = Engine(config, parts, build_loss(config.objective, 1000), precision, cuda)
    inputs = PairInputs(*(x.to(cuda) for x in pair_of_inputs(2, torch.float32)))
    table = PrecomputedErrors(tmp_path, {}, batches(4), 1, cuda)
    list(table.compute(iter([engine.errors_of(StartModel(parts.unet), inputs)])))

    def step() -> None:
        known = table.at(0, 2) if source == "precomputed" else None
        engine.start(1e-4)
        engine.accumulate(inputs, 1.0, reference_errors=known)
        engine.finish()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
