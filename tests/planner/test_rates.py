"""What a card attains: measured here on the CPU, kept on disk, assumed where it cannot be measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mapo_fast.hardware.cards import Rates
from mapo_fast.planner import ask, rates, store
from mapo_fast.planner.trace import CPU
from mapo_fast.util.sizes import GIB
from mapo_kernels import Backend

CUDA = torch.device("cuda")
MEASURED = Rates(*[1e12] * 9, source="measured on a card")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card that counts how often it is measured."""
    pretended = SimpleNamespace(driver="580.1", measured=0, back_end="triton")

    def measure(device: torch.device) -> Rates:
        pretended.measured += 1
        return MEASURED

    monkeypatch.setattr(store, "folder", lambda: tmp_path / "traces")
    monkeypatch.setattr(rates, "driver", lambda: pretended.driver)
    for module in (rates, ask):
        monkeypatch.setattr(module, "backend", lambda device: Backend(pretended.back_end, ""))
    monkeypatch.setattr(rates, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    properties = SimpleNamespace(total_memory=24 * GIB, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return pretended


@pytest.mark.slow
def test_all_rates_are_measured_and_random_numbers_stay_as_they_were() -> None:
    before = torch.random.get_rng_state()
    found = rates.measure(CPU, shrink=32)
    assert all(math.isfinite(value) and value > 0 for value in found[:-1])
    assert found.source == "measured on the CPU"
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_fp8_is_measured_where_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> Rates:
        return rates.measure(CPU, shrink=32)

    without = measured()
    assert without.fp8 == without.matrix
    monkeypatch.setattr(rates, "in_fp8", lambda device: True)
    monkeypatch.setattr(rates, "_fp8", lambda clock, rows, width, out: 7.0)
    assert measured().fp8 == pytest.approx(7.0)


def test_an_fp8_product_is_timed_without_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rounded = rates._Clock(CPU), []
    to_fp8 = rates.to_fp8
    monkeypatch.setattr(rates, "to_fp8", lambda x: rounded.append(x.shape) or to_fp8(x))
    assert 0 < rates._fp8(clock, 64, 32, 48) < math.inf
    assert rounded == [(64, 32), (48, 32)]


def test_a_figure_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = MEASURED._asdict() | {"memory": math.inf}
    del figures["source"]
    monkeypatch.setattr(rates, "_measured", lambda device, shrink: figures)
    with pytest.raises(RuntimeError, match="measured no memory"):
        rates.measure(CPU)


def test_the_median_of_calls_counts_without_what_comes_before() -> None:
    clock, done = rates._Clock(CPU), []
    seconds = clock.seconds(lambda: done.append("call"), lambda: rates.time.sleep(0.01))
    assert len(done) >= 3 + rates.SAMPLES
    assert seconds < 0.005


def test_the_hosts_operations_are_a_traces() -> None:
    """Forward and backward of a block: norms, products, attention and their gradients."""
    assert 40 < rates._operations(kernels=True) < 120


def test_a_card_is_measured_once_for_its_driver(card: SimpleNamespace) -> None:
    assert rates.rates_of(CUDA) == rates.rates_of(CUDA) == MEASURED
    assert card.measured == 1
    card.driver = "590.2"
    rates.rates_of(CUDA)
    assert card.measured == 2
    rates._path(CUDA).write_text("damaged")
    assert rates.rates_of(CUDA) == MEASURED
    assert card.measured == 3
    card.back_end = "eager"  # Python issues other operations then
    rates.rates_of(CUDA)
    assert card.measured == 4


@pytest.mark.parametrize(
    "damage",
    [
        {"matrix": "fast"},
        {"matrix": -1.0},
        {"matrix": None},
        {"matrix": True},
        {"source": 1},
        {"more": 1.0},
        "[" * 200_000,
        '{"matrix": ' + "9" * 5000 + "}",
        "[]",
        '{"matrix": NaN}',
    ],
)
def test_damaged_rates_are_measured_again(card: SimpleNamespace, damage: Any) -> None:
    rates.rates_of(CUDA)
    text = damage if isinstance(damage, str) else json.dumps(MEASURED._asdict() | damage)
    rates._path(CUDA).write_text(text)
    assert rates.rates_of(CUDA) == MEASURED
    assert card.measured == 2


def test_a_run_plans_by_measured_rates_and_says_when_it_does_not(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask.card_of(CUDA).rates == MEASURED
    assert ask.card_of(CUDA).capability == 89
    assert ask.card_of(CUDA).kernels

    def fail(device: torch.device) -> Rates:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(ask, "rates_of", fail)
    found = ask.card_of(CUDA)
    assert found.name == "RTX 4090"
    assert found.rates.source == (
        "assumed from the maker's figures for RTX 4090: not measured (CUDA out of memory)"
    )
    card.back_end = "eager"
    assert not ask.card_of(CUDA).kernels
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GB999")
    assert ask.card_of(CUDA).name == "RTX 3090"
