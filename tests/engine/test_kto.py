"""Diffusion-KTO on single labelled images: the published formula, the trainer around it, and bad data."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mapo_fast.data.cache import CachedPair, PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.engine.baseline import Baseline
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.engine.build import prepare_unet, with_start_model
from mapo_fast.engine.draws import pair_noise, pair_timestep
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.processes import ALONE, Processes, environment, joined
from mapo_fast.engine.reference import StartModel
from mapo_fast.engine.step import PairInputs, predict, training_inputs
from mapo_fast.loss import KTOLoss, PreferenceLoss
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.open import open_sdxl
from mapo_fast.run.log import read_log
from mapo_fast.run.metrics import Metrics
from mapo_fast.run.train import fit
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import png, write_parquet
from tests.engine.pair_steps import gradients, pair_of_inputs, worst
from tests.engine.test_reference import CPU, FP64, config_of, named_gradients
from tests.processes import together
from tests.training import make_cache, make_config, make_images, make_pairs
from tests.unets import make_unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WANTED = torch.tensor([True, False, False, True, True, True])
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


# --- The formula ---


def published(errors: Tensor, reference: Tensor, wanted: Tensor, k: Tensor) -> Tensor:
    """The loss as in the released code, sample by sample; `k` is a number."""
    losses = []
    for e, r, good in zip(errors, reference, wanted, strict=True):
        g = r - e
        if good:
            losses.append(1.5 * (1 - torch.sigmoid(1000.0 * (g - k))))
        else:
            losses.append(0.5 * (1 - torch.sigmoid(-1000.0 * (g - k))))
    return torch.stack(losses).mean()


def some_errors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(6, generator=generator, dtype=torch.float64)
    moves = 2e-3 * torch.randn(6, generator=generator, dtype=torch.float64) - 1e-3
    return (reference + moves).requires_grad_(), reference


def test_the_loss_is_the_published_formula() -> None:
    errors, reference = some_errors()
    k = (reference - errors).detach().mean()
    assert k > 1e-4, "the clamp is not active"
    truth = published(errors, reference, WANTED, k)
    (slopes,) = torch.autograd.grad(truth, errors)
    out = KTOLoss(**WEIGHTS).from_errors(*errors.chunk(2), reference_errors=reference, labels=WANTED)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(out.loss, errors)
    torch.testing.assert_close(found, slopes, rtol=1e-12, atol=0)
    assert torch.equal(out.correct, out.logits > 0)


def test_a_mean_that_fell_counts_as_nothing() -> None:
    errors, reference = some_errors()
    errors = errors.detach() + 0.01
    assert (reference - errors).mean() < 0
    out = KTOLoss(**WEIGHTS).from_errors(*errors.chunk(2), reference_errors=reference, labels=WANTED)
    truth = published(errors, reference, WANTED, torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)


def test_of_pairs_it_is_the_kernels_kto() -> None:
    prediction, target = (torch.randn(6, 4, 3, 3, dtype=torch.float64) for _ in range(2))
    errors = (prediction - target).square().mean((1, 2, 3))
    reference = errors + 1e-3 * torch.randn(6, dtype=torch.float64)
    k = (reference - errors).mean().clamp(min=0)
    labels = torch.arange(6) < 3
    single = KTOLoss(**WEIGHTS)(prediction, target, reference_errors=reference, labels=labels)
    paired = PreferenceLoss("kto", **WEIGHTS)(
        prediction, target, reference_errors=reference, kto_baseline=k[None]
    )
    torch.testing.assert_close(single.loss, paired.loss, rtol=1e-12, atol=0)


def test_what_is_not_finite_shows_in_the_loss() -> None:
    errors, reference = some_errors()
    for bad in (float("nan"), float("inf")):
        broken = errors.detach().clone()
        broken[1] = bad
        out = KTOLoss().from_errors(*broken.chunk(2), reference_errors=reference, labels=WANTED)
        assert not out.loss.isfinite()


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"desirable_weight": -1.0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        KTOLoss(**settings)


# --- The baseline ---


def test_with_one_micro_batch_the_baseline_is_its_mean() -> None:
    baseline = Baseline(1, CPU)
    for gains in ([0.1, 0.3], [0.5], [-1.0, 0.5]):
        mean = max(0.0, sum(gains) / len(gains))
        assert float(baseline(torch.tensor(gains, dtype=torch.float64))) == pytest.approx(mean, rel=1e-15)


def test_with_several_it_is_the_mean_of_as_many_and_survives_a_checkpoint() -> None:
    def gains(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    baseline = Baseline(2, CPU)
    assert float(baseline(gains(0.2, 0.4))) == pytest.approx(0.3)
    assert float(baseline(gains(0.9))) == pytest.approx(0.5)  # (0.2 + 0.4 + 0.9) / 3
    assert float(baseline(gains(float("nan"), 0.1))) == pytest.approx(0.5)  # (0.9 + 0.1) / 2
    resumed, longer = Baseline(2, CPU), Baseline(3, CPU)
    state = json.loads(json.dumps(baseline.state()))
    resumed.restore(state)
    longer.restore(state)
    assert float(longer(gains(0.3))) == pytest.approx(1.3 / 3)  # (0.9 + 0.1 + 0.3) / 3
    assert torch.equal(resumed(gains(0.3)), baseline(gains(0.3)))


# --- The engine: gradients in fp64, every layout and kind of reference ---


def weighted(config: Config) -> Config:
    """The config with `WEIGHTS`."""
    return config.model_copy(update={"objective": config.objective.model_copy(update=WEIGHTS)})


def inputs_of_samples() -> PairInputs:
    """Six samples that have nothing in common."""
    inputs = pair_of_inputs()
    steps = torch.tensor([3, 200, 999, 471, 640, 88])
    return inputs._replace(timesteps=steps, prompt_embeds=torch.randn_like(inputs.prompt_embeds))


def engine_and_errors(
    config: Config, inputs: PairInputs, processes: Processes = ALONE
) -> tuple[Engine, Tensor | None]:
    parts = prepare_unet(make_unet("sdxl"), config, FP64, CPU)
    parts = with_start_model(parts, config, lambda: make_unet("sdxl"))
    engine = Engine(config, parts, build_loss(config.objective, 1000), FP64, CPU, processes)
    known = engine.errors_of(StartModel(parts.unet), inputs) if config.reference == "precomputed" else None
    return engine, known


def improved(inputs: PairInputs) -> Any:
    """diffusers' UNet, a gradient step better than the start model on these samples: k is not clamped."""
    unet = make_unet("sdxl")
    parameters = list(unet.parameters())
    error = (predict(unet, inputs) - inputs.target).square().mean()
    slopes = torch.autograd.grad(error, parameters)
    step = 3e-4 / sum(float(slope.square().sum()) for slope in slopes)
    with torch.no_grad():
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.sub_(step * slope)
    return unet


def plain(unet: Any, inputs: PairInputs) -> dict[str, Tensor]:
    """Gradients of diffusers' UNet by autograd."""
    with torch.no_grad():
        r = (predict(make_unet("sdxl"), inputs) - inputs.target).square().mean((1, 2, 3))

    def backward() -> None:
        e = (predict(unet, inputs) - inputs.target).square().mean((1, 2, 3))
        g = (r - e).detach()
        assert g.mean() > 1e-4
        assert g[:4].mean() != g.mean()
        published(e, r, WANTED, g.mean()).backward()

    return gradients(unet, backward)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "split", "sequential"])
@pytest.mark.parametrize("source", ["copy", "precomputed"])
def test_gradients_are_those_of_the_published_formula(layout: str, source: str) -> None:
    torch.manual_seed(0)
    inputs = inputs_of_samples()
    train_settings = {"layout": layout, "gradient_checkpointing": layout == "split", "pairs_per_batch": 3}
    config = weighted(config_of("kto", "full", source, train=train_settings))
    engine, known = engine_and_errors(config, inputs)
    unet = improved(inputs)
    engine.unet.load_state_dict(unet.state_dict())
    out = engine.accumulate(inputs, 1.0, reference_errors=known, labels=WANTED)
    assert 0 < out.logits.abs().min() < out.logits.abs().max() < 10
    assert worst(named_gradients(engine.parts), plain(unet, inputs)) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "sequential"])
def test_a_lora_compares_with_itself_switched_off(layout: str) -> None:
    """At the start there is no gain to a bit, so z = 0 and the loss is the mean of w/2."""
    inputs = inputs_of_samples()
    engine, _ = engine_and_errors(config_of("kto", "lora", train={"layout": layout}), inputs)
    out = engine.accumulate(inputs, 1.0, labels=WANTED)
    assert torch.equal(out.logits, torch.zeros(6, dtype=torch.float64))
    assert float(out.loss.detach()) == 0.5
    assert any(bool(g.any()) for g in named_gradients(engine.parts).values())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_compare_with_the_mean_of_both(tmp_path: Path) -> None:
    """Four samples here and two there give the gradients of six in one."""
    torch.manual_seed(0)
    inputs = inputs_of_samples()
    config = weighted(config_of("kto", "full", "copy"))
    unet = improved(inputs)

    def run() -> dict[str, Tensor]:
        processes = environment()
        mine = (slice(0, 4), slice(4, 6))[processes.rank]
        with joined(processes, CPU):
            engine, _ = engine_and_errors(config, inputs, processes)
            engine.unet.load_state_dict(unet.state_dict())
            part = PairInputs(*(x[mine] for x in inputs))
            engine.accumulate(part, len(part.noisy) / 6, labels=WANTED[mine])
            processes.sum_gradients(engine.parameters)
            return named_gradients(engine.parts)

    truth = plain(unet, inputs)
    for found in together(tmp_path, run):
        assert worst(found, truth) <= 1e-10


# --- Micro-batches and figures ---


@pytest.mark.parametrize("size", [1, 3])
def test_two_images_count_as_a_pair_and_an_odd_one_comes_twice(size: int) -> None:
    images = [CachedPair(str(i), (64, 64) if i % 3 else (32, 96), i) for i in range(22)]  # 14 and 8
    images += [CachedPair("22", (64, 64), 22)]
    images.sort(key=lambda image: image.bucket)
    batches = MicroBatches(images, size, 0, paired=False)
    twice = set()
    for epoch in range(4):
        seen: Counter[str] = Counter()
        for index in range(batches.per_epoch):
            found, drawn = batches.at(epoch * batches.per_epoch + index)
            assert found == epoch
            assert len(drawn) in range(2, 2 * size + 1, 2)
            seen.update(image.id for image in drawn)
        assert set(seen) == {image.id for image in images}
        extra = [name for name, count in seen.items() if count == 2]
        assert len(extra) == 1
        assert sum(seen.values()) == 24
        twice.update(extra)
    assert len(twice) > 1


def test_a_step_that_was_not_finished_leaves_no_trace() -> None:
    """In the baseline and in the figures: what is saved then is the step before."""
    baseline, metrics = Baseline(2, CPU), Metrics(CPU, paired=False)
    halves = torch.tensor([0.1, 0.2]).chunk(2)
    reference, labels = torch.full((2,), 0.5), torch.tensor([True, False])

    def micro_batch() -> None:
        loss = KTOLoss(beta=1.0)
        metrics.add(loss.from_errors(*halves, reference_errors=reference, labels=labels, baseline=baseline))

    for begun in (metrics, baseline):
        begun.begin()
    micro_batch()
    metrics.add_step(torch.tensor(1.0))
    before = metrics.state(), baseline.state()
    for begun in (metrics, baseline):
        begun.begin()
    micro_batch()
    assert (metrics.state(), baseline.state()) != before
    for begun in (metrics, baseline):
        begun.drop()
    assert (metrics.state(), baseline.state()) == before


def test_the_errors_of_wanted_and_unwanted_images_are_apart() -> None:
    metrics = Metrics(CPU, paired=False)
    reference = torch.full((2,), 0.5)
    for errors, wanted in (([0.1, 0.2], [True, True]), ([0.6, 0.9], [True, False])):
        halves = torch.tensor(errors).chunk(2)
        out = KTOLoss(beta=1.0).from_errors(*halves, reference_errors=reference, labels=torch.tensor(wanted))
        metrics.add(out)

    class Optimizer:
        skipped = skipped_in_a_row = torch.zeros((), dtype=torch.int64)

    figures, _ = metrics.fetch(Optimizer())  # type: ignore[arg-type]
    assert figures["chosen_error"] == pytest.approx(0.3)
    assert figures["rejected_error"] == pytest.approx(0.9)
    assert "margin" not in figures


# --- Prepare and train ---


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = make_images(folder / "images")
    summary = prepare(
        make_config(tiny_sdxl, folder / "cache", folder / "unused", data={"source": str(source)})
    )
    assert not summary.paired
    assert summary.pairs == summary.images
    return folder / "cache"


@pytest.fixture
def make(tiny_sdxl: Path, cache: Path, tmp_path: Path) -> Callable[..., Config]:
    def build(name: str = "kto", kind: str = "lora", /, **steps: Any) -> Config:
        return make_config(
            tiny_sdxl,
            cache,
            tmp_path / "run",
            objective={"name": name},
            adapter={"kind": kind},
            train={"steps": 3, "checkpoint_every": 2, "log_every": 1, **steps},
            optim={"lr": 1e-3, "warmup_steps": 0},
        )

    return build


@pytest.mark.slow
def test_every_image_has_its_own_label_noise_and_timestep(tiny_sdxl: Path, cache: Path) -> None:
    opened = PairCache.open(cache)
    assert not opened.paired
    samples = list(opened.train[:6])
    names = [row.name for row in opened.rows(samples)]
    lines = (cache.parent / "images" / "pairs.jsonl").read_text().splitlines()
    labels = [bool(json.loads(lines[int(name.rpartition(":")[2]) - 1])["label"]) for name in names]
    assert opened.wanted(samples).tolist() == labels
    assert len(set(labels)) == 2
    diffusion = Diffusion(open_sdxl(tiny_sdxl).scheduler_config)
    inputs = training_inputs(opened, samples, diffusion, seed=5, epoch=2, caption_dropout=0.0, device=CPU)
    shape = tuple(inputs.noisy.shape[1:])
    for i, sample in enumerate(samples):
        assert torch.equal(inputs.target[i], pair_noise(5, 2, sample.id, shape))
        assert int(inputs.timesteps[i]) == pair_timestep(5, 2, sample.id, 1000)


RESULT = {"full": "unet/diffusion_pytorch_model.safetensors", "lora": "lora/pytorch_lora_weights.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pairs"), [("lora", 1), ("full", 2)])
def test_a_run_and_its_resume(make: Callable[..., Config], tmp_path: Path, kind: str, pairs: int) -> None:
    """The baseline of the third step needs the second one's gains, which the checkpoint holds."""
    config = make("kto", kind, accumulation=2, pairs_per_batch=pairs)
    assert fit(config).finished
    once = load_file(tmp_path / "run" / RESULT[kind])
    for done in (Path(RESULT[kind]).parent, "checkpoints/step-00000003"):
        shutil.rmtree(tmp_path / "run" / done)
    state = json.loads((tmp_path / "run/checkpoints/step-00000002/state.json").read_text())
    baseline = state["state"]["baseline"]
    assert len(baseline) == 2
    assert all(total != 0 and samples in (2, 4) for total, samples in baseline)
    assert fit(config, resume=True).finished
    again = load_file(tmp_path / "run" / RESULT[kind])
    assert all(torch.equal(again[name], tensor) for name, tensor in once.items())
    entries = read_log(tmp_path / "run" / "log.jsonl")
    few = [e for e in entries if e["event"] == "warning" and "a step has 4 images" in e["message"]]
    assert bool(few) == (pairs == 1), "fewer than 8 samples a step warn"
    steps = [e for e in entries if e["event"] == "step"]
    assert all(
        torch.isfinite(torch.tensor([e["loss"], e["chosen_error"], e["grad_norm"]])).all() for e in steps
    )
    looks = [e for e in entries if e["event"] == "evaluation"]
    assert [e["step"] for e in looks] == [0, 3]
    assert "accuracy" not in looks[-1]
    assert {"chosen_error_change", "rejected_error_change"} & looks[-1].keys()


@pytest.mark.slow
def test_the_objective_and_the_data_must_fit(
    make: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"objective.name = 'dpo' learns from pairs .* use objective.name = 'kto'"
    ):
        fit(make("dpo"))
    pairs = make_cache(tiny_sdxl, tmp_path)
    config = make()
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache": pairs})})
    with pytest.raises(UserError, match=r"objective.name = 'kto' learns from single labelled images"):
        fit(config)
    assert not (tmp_path / "run").exists()


# --- Bad data ---


def prepared(model: Path, source: Path, **data: Any) -> dict[str, str]:
    """Reasons of the rows that were skipped."""
    cache = source.parent / "cache"
    prepare(
        make_config(model, cache, cache / "unused", data={"source": str(source), "max_skipped": 1.0, **data})
    )
    lines = (cache / "skipped.jsonl").read_text().splitlines()
    return {row["row"]: f"{row['reason']}: {row['detail']}" for row in map(json.loads, lines)}


def test_rows_that_cannot_be_used_are_listed(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.png").write_bytes(png(i))
    rows = [
        {"prompt": "a", "image": "0.png", "label": 1},
        {"prompt": "a", "image": "1.png"},
        {"prompt": "a", "image": "1.png", "label": "yes"},
        {"prompt": "a", "image": "1.png", "label": 0.5},
        {"prompt": "a", "label": True},
        {"prompt": "b", "image": "2.png", "label": True},
        {"prompt": "b", "image": "2.png", "label": False},
        {"prompt": "a", "image": "3.png", "label": False},
    ]
    (source / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = prepared(tiny_sdxl, source)
    assert skipped.keys() == {f"pairs.jsonl:{n}" for n in range(2, 9)}
    assert skipped["pairs.jsonl:2"] == "no label: label is missing, null or blank"
    assert skipped["pairs.jsonl:3"] == "bad label: label = 'yes' is neither true or 1 nor false or 0"
    assert skipped["pairs.jsonl:4"].startswith("bad label: label = 0.5")
    assert skipped["pairs.jsonl:5"].startswith("bad line: needs the keys prompt, image")
    assert skipped["pairs.jsonl:6"].startswith("contradiction: pairs.jsonl:7 labels it otherwise")
    assert skipped["pairs.jsonl:7"].startswith("contradiction: pairs.jsonl:6")
    assert skipped["pairs.jsonl:8"].startswith("missing image")


def test_a_file_of_pairs_and_single_images_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = make_pairs(tmp_path / "pairs", 3)
    lines = (source / "pairs.jsonl").read_text()
    single = json.dumps({"prompt": "x", "image": "000-chosen.png", "label": 1}) + "\n"
    for text, line in ((lines + single, 4), (single + lines, 2)):
        (source / "pairs.jsonl").write_text(text)
        with pytest.raises(UserError, match=rf"mixes pairs .* line {line} is not what the first one is"):
            prepared(tiny_sdxl, source)


@pytest.mark.slow
def test_parquet_and_a_saved_dataset_with_the_same_columns(tiny_sdxl: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"prompt": f"thing {i}", "image": png(i), "label": i % 2} for i in range(5)]
    rows.append({"prompt": "thing", "image": png(9), "label": None})  # type: ignore[dict-item]
    write_parquet(tmp_path / "one" / "images" / "a.parquet", rows)
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "two" / "images"))
    for name, skipped in (("one", "a.parquet:5"), ("two", "images:5")):
        source = tmp_path / name / "images"
        assert list(prepared(tiny_sdxl, source, held_out=0.0)) == [skipped]
        opened = PairCache.open(tmp_path / name / "cache")
        found = {
            row.prompt: label
            for row, label in zip(
                opened.rows(opened.train[:]), opened.wanted(opened.train[:]).tolist(), strict=True
            )
        }
        assert found == {f"thing {i}": bool(i % 2) for i in range(5)}
