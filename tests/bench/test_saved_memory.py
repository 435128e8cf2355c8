"""The committed table of saved activations is what the code saves, and meets its targets."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from bench import saved_memory
from bench.cases import cases


def committed() -> list[dict[str, Any]]:
    return [json.loads(line) for line in saved_memory.RESULTS.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_one_pair_through_sdxl_saves_5_gib_less() -> None:
    plain, table = (
        next(
            r for r in committed() if r["what"] == "unet" and "full" in r["name"] and r["patched"] is patched
        )
        for patched in (False, True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations
        row = saved_memory.unet_row("full", patched=True)
    assert row == {key: table[key] for key in row}
    assert plain["saved_gib"] - row["saved_gib"] >= 5.0


def test_no_block_saves_more_than_compiled() -> None:
    blocks = [row for row in committed() if row["what"] == "block"]
    assert {row["name"] for row in blocks} == set(saved_memory.BLOCKS)
    for row in blocks:
        assert row["patched_mib"] < row["plain_compiled_mib"] <= row["plain_mib"], row


OPERATORS = [
    case for case in cases(use="count") if case.headline and case.op not in saved_memory.WITHOUT_BACKWARD
]


@pytest.mark.slow
@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: str(case.key))
def test_operators(case: Any) -> None:
    row = saved_memory.op_row(case)
    table = next(
        r for r in committed() if (r["name"], r.get("shape"), r["dtype"]) == case.key and r["what"] == "op"
    )
    assert row == {key: table[key] for key in row}
