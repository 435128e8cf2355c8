"""The memory table reaches its targets, and a full trace made now says what the committed one says."""

from __future__ import annotations

import json

import pytest

from bench import memory_table

ROWS = [json.loads(line) for line in memory_table.RESULTS.read_text(encoding="utf-8").splitlines()]


def test_every_plan_is_in_the_table() -> None:
    assert [(row["name"], row["plan"]) for row in ROWS] == [
        (name, plan) for name, _, _, plan in memory_table.ROWS
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_targets_are_reached(row: dict[str, float]) -> None:
    assert row["peak_gib"] <= row["target_gib"]


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row["name"] for row in ROWS])
def test_a_trace_made_now_agrees(number: int) -> None:
    made = memory_table.row(number)
    assert made["peak_gib"] == pytest.approx(ROWS[number]["peak_gib"], abs=0.02)
    assert made["peak_gib"] <= made["target_gib"]
