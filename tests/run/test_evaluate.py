"""Held-out figures are changes from the start model on the same pairs, timesteps and noise."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mapo_fast.data.cache import PairCache
from mapo_fast.engine.draws import pair_noise, stratified_timesteps
from mapo_fast.engine.step import pair_inputs, predict
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.open import open_sdxl
from mapo_fast.run.evaluate import HeldOut, HeldOutErrors, compare, load_errors, paired_change, save_errors
from mapo_fast.util.records import WrongFileError
from mapo_fast.util.students_t import half_width
from tests.training import make_cache


@pytest.fixture(scope="module")
def held_out(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    cache = PairCache.open(make_cache(tiny_sdxl, tmp_path_factory.mktemp("data")))
    diffusion = Diffusion(open_sdxl(tiny_sdxl).scheduler_config)
    pairs = list(cache.held_out)
    assert len(pairs) >= 3
    return HeldOut(cache, pairs, diffusion, draws=9, draws_per_batch=4, seed=3, device=torch.device("cpu"))


@pytest.mark.slow
def test_errors_are_the_denoising_errors_at_fixed_draws(held_out: HeldOut, tiny_sdxl: Path) -> None:
    unet = open_sdxl(tiny_sdxl).load_unet().train()
    found = held_out.errors(unet, nullcontext())
    assert unet.training
    assert found.chosen.shape == (len(held_out.pairs), 9)
    index, draw = 2, 5
    pair = held_out.pairs[index]
    batch = held_out.cache.batch([pair], flip=None, drop=None)
    noise = pair_noise(3, "held-out", pair.id, tuple(batch.chosen_latents.shape[1:]), draw=draw)[None]
    steps = torch.tensor([stratified_timesteps(3, "held-out", pair.id, 1000, 9)[draw]])
    inputs = pair_inputs(batch, noise, steps, held_out.diffusion, torch.device("cpu"))
    with torch.no_grad():
        error = (predict(unet.eval(), inputs) - inputs.target).square().mean(dim=(1, 2, 3))
    assert found.chosen[index, draw] == pytest.approx(float(error[0]), rel=1e-5)
    assert found.rejected[index, draw] == pytest.approx(float(error[1]), rel=1e-5)


def test_figures_of_each_noise_level() -> None:
    """Nine draws: the noise levels have 2, 2, 2 and 3 of them, and the margin grows in the last alone."""
    start = HeldOutErrors(torch.full((5, 9), 0.5), torch.full((5, 9), 0.6), [])
    moved = start.rejected.clone()
    moved[:, 6:] += torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[:, None]
    figures = compare(start._replace(rejected=moved, chosen=start.chosen - 0.25), start)
    bins = figures["bins"]
    assert list(bins) == ["0-22%", "22-44%", "44-67%", "67-100%"]
    assert [round(one["margin_change"]["mean"], 5) for one in bins.values()] == [0.25, 0.25, 0.25, 3.25]
    assert bins["67-100%"]["margin_change"]["high"] == pytest.approx(
        3.25 + half_width(0.95, 4) * 2.5**0.5 / 5**0.5
    )
    assert [one["chosen_error_change"]["mean"] for one in bins.values()] == [-0.25] * 4
    weights = [2 / 9, 2 / 9, 2 / 9, 3 / 9]
    whole = sum(w * one["margin_change"]["mean"] for w, one in zip(weights, bins.values(), strict=True))
    assert whole == pytest.approx(figures["margin_change"]["mean"])


@pytest.mark.slow
def test_evaluating_twice_gives_the_same_bits_and_survives_a_file(
    held_out: HeldOut, tiny_sdxl: Path, tmp_path: Path
) -> None:
    unet = open_sdxl(tiny_sdxl).load_unet()
    first, second = held_out.errors(unet, nullcontext()), held_out.errors(unet, nullcontext())
    save_errors(first, tmp_path / "start.safetensors", "run")
    loaded = load_errors(tmp_path / "start.safetensors", "run", held_out)
    assert loaded is not None
    for one, other in ((first, second), (first, loaded)):
        assert torch.equal(one.chosen, other.chosen)
        assert torch.equal(one.rejected, other.rejected)
        assert all(torch.equal(a, b) for a, b in zip(one.predictions, other.predictions, strict=True))
    assert compare(second, loaded)["drift"] == 0.0


def test_the_interval_is_paired() -> None:
    start = torch.tensor([0.1, 0.9, 0.4, 0.6])
    change = paired_change(start + torch.tensor([0.1, 0.1, 0.1, 0.2]), start)
    assert change.mean == pytest.approx(0.125, abs=1e-6)
    half = 3.1824463 * 0.05 / math.sqrt(4)  # t(3 degrees of freedom, 0.975), standard deviation 0.05
    assert change.low == pytest.approx(0.125 - half, abs=1e-6)
    assert change.high == pytest.approx(0.125 + half, abs=1e-6)
    assert paired_change(start[:1] + 1, start[:1])[1:] == (None, None)


def test_the_figures_of_a_comparison() -> None:
    def errors(chosen: list[list[float]], rejected: list[list[float]], value: float) -> HeldOutErrors:
        predictions = [torch.full((2, 1, 2, 2), value).half() for _ in chosen]
        return HeldOutErrors(torch.tensor(chosen), torch.tensor(rejected), predictions)

    start = errors([[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.5], [0.5, 0.5]], 2.0)
    now = errors([[0.5, 0.5], [1.0, 0.5]], [[2.0, 0.6], [0.5, 0.6]], 3.0)
    figures = compare(now, start)
    assert figures["accuracy_start"] == pytest.approx(0.25)
    assert figures["accuracy"] == pytest.approx(0.75)
    assert figures["accuracy_change"]["mean"] == pytest.approx(0.5)
    assert figures["margin_change"]["mean"] == pytest.approx((0.55 + 0.3) / 2)
    assert figures["chosen_error_change"]["mean"] == pytest.approx(-0.375)
    assert figures["drift"] == pytest.approx(0.25)
    assert (figures["pairs"], figures["draws"]) == (2, 2)


@pytest.mark.slow
def test_a_start_that_does_not_fit_is_measured_again(
    held_out: HeldOut, tiny_sdxl: Path, tmp_path: Path
) -> None:
    path = tmp_path / "start.safetensors"
    assert load_errors(path, "run", held_out) is None
    save_errors(held_out.errors(open_sdxl(tiny_sdxl).load_unet(), nullcontext()), path, "run")
    whole = path.read_bytes()
    assert load_errors(path, "run", held_out) is not None
    with pytest.raises(WrongFileError, match="is another file under this name"):
        load_errors(path, "another run", held_out)
    fewer = HeldOut(
        held_out.cache,
        held_out.pairs[:-1],
        held_out.diffusion,
        draws=9,
        draws_per_batch=1,
        seed=3,
        device=held_out.device,
    )
    with pytest.raises(WrongFileError, match="other pairs or draws"):
        load_errors(path, "run", fewer)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WrongFileError, match="is not a safetensors file"):
        load_errors(path, "run", held_out)


@pytest.mark.slow
def test_any_flipped_bit_of_the_start_is_found(held_out: HeldOut, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Damage to the lengths, the header or the numbers is noticed; the header's padding is not read."""
    path = tmp_path / "start.safetensors"
    save_errors(held_out.errors(open_sdxl(tiny_sdxl).load_unet(), nullcontext()), path, "run")
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    for place in [
        *range(16),
        *chance.sample(range(16, head), 60),
        *chance.sample(range(head, len(whole)), 60),
    ]:
        if whole[place : place + 1] == b" ":
            continue
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(WrongFileError):
            load_errors(path, "run", held_out)


def test_a_model_that_predicts_nan_has_no_accuracy() -> None:
    def errors(value: float) -> HeldOutErrors:
        chosen = torch.tensor([[0.1, value], [0.1, 0.1]])
        return HeldOutErrors(chosen, torch.full((2, 2), 0.2), [torch.ones(2, 1, 1, 1).half()] * 2)

    assert compare(errors(0.1), errors(0.1))["accuracy"] == 1.0
    assert math.isnan(compare(errors(float("nan")), errors(0.1))["accuracy"])
