"""Predicted against measured: figures, verdicts, and a measurement that can stop and go on."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench import gpu_memory
from bench.memory_table import ROWS
from mapo_fast.hardware.names import find_card
from mapo_fast.planner.trace import CPU
from mapo_fast.util.sizes import GIB
from tests.planner.test_recorder import REDUCED

FOREVER = float("inf")


def plan(predicted_ms: float, ms: float, spread: float = 0.0, **figures: float) -> dict[str, Any]:
    return {
        "predicted_ms": predicted_ms, "ms": ms, "ms_p20": ms - spread / 2, "ms_p80": ms + spread / 2,
        "predicted_gib": 10.0, "allocated_gib": 10.1, "workspaces_gib": 0.05, "reserved_gib": 10.5,
        "predicted_reserved_gib": 10.4,
        "plan": {}, "rates": "measured",
    } | figures  # fmt: skip


def measure(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """On the CPU, with the code that measures on a GPU but for its counters."""
    monkeypatch.setattr(gpu_memory, "STEPS", 2)
    settings = {
        "adapter.kind": "lora",
        "data.resolution": 64,
        "train.precision": "fp32",
        "optim.name": "adamw",
    }
    return gpu_memory.measure(settings, GIB, CPU, unet)


@pytest.mark.slow
def test_a_plan_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(UNet2DConditionModel.from_config(REDUCED), monkeypatch)
    assert 0 < found["ms_p20"] <= found["ms"] <= found["ms_p80"]


@pytest.mark.slow
def test_a_step_that_updates_nothing_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNet2DConditionModel.from_config(REDUCED)
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        measure(unet, monkeypatch)


def test_workspaces_are_not_the_predictions() -> None:
    row = gpu_memory.judged(plan(100, 120, allocated_gib=10.52, workspaces_gib=0.1))
    assert row["memory_error"] == pytest.approx(0.042)
    assert row["time_error"] == pytest.approx(0.2)
    assert row["memory_ok"]
    assert row["time_ok"]


@pytest.mark.parametrize(
    "figures",
    [{"allocated_gib": 10.6}, {"allocated_gib": 9.5}, {"workspaces_gib": 0.6}],
)
def test_memory_off_by_more_than_a_twentieth_is_missed(figures: dict[str, float]) -> None:
    row = gpu_memory.judged(plan(100, 100, **figures)) | {"kind": "row", "name": "a plan"}
    assert gpu_memory.missed(row) == ["memory"]
    assert "MISSED: memory" in gpu_memory.line(row)


@pytest.mark.parametrize("gib", [9.8, 11.0])
def test_what_is_reserved_has_to_be_what_the_replay_says(gib: float) -> None:
    row = gpu_memory.judged(plan(100, 100, reserved_gib=gib))
    assert gpu_memory.missed(row | {"kind": "row"}) == ["reserved"]
    assert gpu_memory.missed(row | {"kind": "allocator"}) == []
    assert gpu_memory.missed({"kind": "allocator", "error": "OutOfMemoryError: too much"}) == ["an error"]


@pytest.mark.parametrize("ms", [74, 126])
def test_time_off_by_more_than_a_quarter_is_missed(ms: float) -> None:
    assert gpu_memory.missed(gpu_memory.judged(plan(100, ms)) | {"kind": "row"}) == ["time"]


def test_plans_rank_as_predicted_reversed_or_tied() -> None:
    rising = [plan(100, 110), plan(110, 130), plan(150, 150)]
    assert gpu_memory.ranked(rising) == "as predicted"
    assert gpu_memory.ranked([plan(100, 110), plan(110, 105), plan(150, 150)]) == "reversed"
    within_noise = [plan(100, 110, spread=6), plan(110, 105), plan(150, 150)]
    assert gpu_memory.ranked(within_noise) == "as predicted"
    assert gpu_memory.ranked([plan(100, 110.5), plan(110, 110)]) == "tied"
    assert gpu_memory.ranked([plan(100, 120), plan(100.4, 100)]) == "tied"  # predicted equal


@pytest.mark.slow
def test_a_budgets_three_fastest_plans_are_predicted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # for a small UNet more processes only cost time
    monkeypatch.setattr(gpu_memory, "SDXL_UNET", REDUCED)
    asked = {"adapter.kind": "full", "data.resolution": 128}
    monkeypatch.setattr(gpu_memory, "RANKINGS", {"all of it": (12, asked)})
    plans = gpu_memory.predict("all of it", find_card("RTX 3090"))
    assert len(plans) == 3
    assert len({json.dumps(one["plan"]) for one in plans}) == 3
    assert [one["predicted_ms"] for one in plans] == sorted(one["predicted_ms"] for one in plans)
    for one in plans:
        assert asked.items() <= one["plan"].items()
        assert gpu_memory.config_of(json.loads(json.dumps(one["plan"]))).train.layout


def test_every_row_and_ranking_is_measured_once() -> None:
    every = [*(name for name, *_ in ROWS), *gpu_memory.RANKINGS, *gpu_memory.ALLOCATORS]
    assert sorted(gpu_memory.names()) == sorted(every)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A card of 24 GiB on which all plans take what is predicted; the plans that were measured."""
    settings: list[dict[str, Any]] = []

    def alone(chosen: dict[str, Any], cap: int, deadline: float, expandable: bool | None) -> dict[str, Any]:
        settings.append(chosen | {"cap": cap, "expandable": expandable})
        return {name: plan(100, 100)[name] for name in (
            "ms", "ms_p20", "ms_p80", "allocated_gib", "workspaces_gib", "reserved_gib"
        )}  # fmt: skip

    def predict(name: str, card: object) -> list[dict[str, Any]]:
        count = 3 if name in gpu_memory.RANKINGS else 1
        predicted = {"predicted_gib": 10.0, "predicted_ms": 100.0, "predicted_reserved_gib": 10.5}
        return [{"plan": {"of": name}, "least_cap_gib": 10.2, "rates": "", **predicted}] * count

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(gpu_memory, "_alone", alone)
    monkeypatch.setattr(gpu_memory, "predict", predict)
    monkeypatch.setattr(gpu_memory, "card_of", lambda device: find_card("RTX 3090"))
    properties = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return settings


@pytest.mark.slow
def test_rows_are_kept_and_only_missing_ones_measured(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "rows.jsonl"
    assert gpu_memory.run(FOREVER, results) == 0
    rows = [json.loads(text) for text in results.read_text().splitlines()]
    assert [row["name"] for row in rows] == gpu_memory.names()
    assert {row["kind"] for row in rows} == {"row", "ranking", "allocator"}
    caps = {one["of"]: (round(one["cap"] / GIB, 2), one["expandable"]) for one in measured}
    assert caps["full, checkpointed"] == (10.65, None)
    assert caps["full, checkpointed, default segments"] == (10.35, False)
    assert caps["full, checkpointed, expandable segments"] == (10.35, True)
    assert caps["full in 12 GiB"] == (11.6, None)
    assert "memory within 5%: 10 of 10 rows" in capsys.readouterr().out
    done = len(measured)
    results.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:-1]))
    assert gpu_memory.run(FOREVER, results) == 0
    assert len(measured) == done + 1
    missing = rows[0] | {"memory_ok": False}
    results.write_text(f"{json.dumps(missing)}\n")
    assert gpu_memory.run(FOREVER, results) == 1  # what was measured before counts


@pytest.mark.slow
def test_nothing_is_begun_when_the_time_is_up(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    gpu_memory.run(time.monotonic() + 10, tmp_path / "rows.jsonl")
    assert not measured


@pytest.mark.slow
def test_a_plan_that_fails_is_a_row_and_a_failure(
    measured: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise subprocess.CalledProcessError(1, "python", stderr="Traceback\nOutOfMemoryError: too much")

    monkeypatch.setattr(gpu_memory, "_alone", fail)
    results = tmp_path / "rows.jsonl"
    assert gpu_memory.run(FOREVER, results) == len(gpu_memory.names())
    assert json.loads(results.read_text().splitlines()[0])["error"] == "OutOfMemoryError: too much"


@pytest.mark.parametrize(("expandable", "told"), [(None, None), (False, "False"), (True, "True")])
def test_an_allocator_is_chosen_by_what_a_user_would_set(
    expandable: bool | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []

    def run(command: list[str], **settings: Any) -> Any:
        environments.append(settings["env"])
        return SimpleNamespace(stdout='{"ms": 1.0}')

    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(gpu_memory.subprocess, "run", run)
    assert gpu_memory._alone({}, GIB, FOREVER, expandable) == {"ms": 1.0}
    expected = None if told is None else f"expandable_segments:{told}"
    assert environments[0].get("PYTORCH_ALLOC_CONF") == expected
