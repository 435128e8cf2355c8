"""Scaling and the tables of whole steps: what is measured is what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import scaling, step_tables
from bench.random_cache import write_random_cache


def test_starting_loads_a_batch_of_a_random_cache(tmp_path: Path) -> None:
    folder = write_random_cache(
        tmp_path / "c", 5000, [(64, 64), (32, 96)], vae_factor=8, text_widths=(8, 12), pooled=12
    )
    found = scaling.started(folder)
    assert 0 < found["seconds"] < 2
    assert found["grown_mib"] < 100


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(step_tables, "RESULTS", tmp_path)
    return tmp_path / "train_step.jsonl"


def row(provider: str, ms: float, commit: str = "a", **fields: Any) -> str:
    common = {"size": "sdxl", "kind": "full", "pairs": 4, "device": "cuda", "ms_per_pair": ms / 4}
    more = {"mfu": 0.6, "peak_gib": 40.0, "idle": 0.05, "update": 0.02, "update_times_floor": 1.2}
    stamp = {"environment": {"gpu": "H100", "commit": commit}}
    return json.dumps({"provider": provider, "ms": ms, **common, **more, **stamp, **fields}) + "\n"


def test_targets_are_met_missed_or_not_measured(results: Path) -> None:
    assert step_tables.targets().count("not measured yet") == len(step_tables.TARGETS)
    results.write_text(row("released", 400.0) + row("mapo_fast", 100.0) + row("dpo_full", 120.0))
    table = step_tables.targets()
    assert "| full, 4 pairs: against the released recipe | ≥ 3 × | 4.00 | met |" in table
    assert "| full, 4 pairs: time less than Diffusion-DPO's | ≥ 22 % | 16.7% | MISSED |" in table
    assert "| full, 4 pairs: idle between kernels | ≤ 3 % | 5.0% | MISSED |" in table
    assert "| full, 4 pairs: optimizer against its byte floor | ≤ 1.25 × | 1.20 | met |" in table
    assert "| full, 1 pair: MFU | ≥ 45 % | not measured yet | |" in table


def test_rows_of_another_commit_are_not_compared(results: Path) -> None:
    results.write_text(row("released", 400.0, commit="old") + row("mapo_fast", 100.0))
    assert "against the released recipe | ≥ 3 × | not measured yet" in step_tables.targets()
    assert "released" not in step_tables.providers()


def test_what_did_not_fit_is_no_row(results: Path) -> None:
    results.write_text(row("mapo_fast", 100.0) + row("dpo_full", 1.0, error="CUDA out of memory"))
    assert "dpo_full" not in step_tables.providers()


def test_switches_stand_beside_the_plan(results: Path) -> None:
    results.write_text(row("mapo_fast", 100.0) + row("mapo_fast, compile on", 80.0))
    assert "| compile on | time × 0.80 | not measured yet |" in step_tables.switches()
    assert "| fp8 base | not measured yet |  |" in step_tables.switches()
    results.write_text(row("mapo_fast", 100.0) + row("mapo_fast, fp8 base", 70.0))
    assert "| fp8 base | time × 0.70 |  |" in step_tables.switches()
