"""Every kernel compiles for every supported card, fits its shared memory and spills no registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes a program may use, by compute capability; the compiler does not enforce it."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tests/kernels/aot.py"), *map(str, SHARED_MEMORY)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_compiles_without_spills(compiled: list[dict[str, Any]]) -> None:
    assert {row["capability"] for row in compiled} == set(SHARED_MEMORY)
    assert len(compiled) == 4 * len(SHARED_MEMORY) + (8 + 8 + 10 + 3) * 2
    for row in compiled:
        where = (row["case"], row["capability"])
        assert row["shared"] <= SHARED_MEMORY[row["capability"]], where
        if row["capability"] >= 80:
            assert row["spills"] == 0, where
            assert row["registers"] <= 128, where


def test_dense_latents_move_in_16_byte_accesses(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["case"].startswith("SDXL"):
            data = re.findall(r"(?:ld|st)\.global\.v4\.b32", row["ptx"])
            assert len(data) >= 3, row["case"]  # bf16 prediction, and two halves of the fp32 target


def test_partial_sums_are_published_in_order(compiled: list[dict[str, Any]]) -> None:
    """Store, barrier, acquire-release addition, barrier, reads past L1: what the last program relies on."""
    forwards = [row["ptx"] for row in compiled if "forward" in row["case"]]
    assert forwards
    order = r"st\.global.*?bar\.sync.*?atom\.global\.gpu\.acq_rel\.add\.u32.*?bar\.sync.*?ld\.global\.cg"
    for ptx in forwards:
        assert re.search(order, ptx, re.DOTALL)
        assert len(re.findall(r"\b(?:atom|red)\.", ptx)) == 1  # and no atomics on floats
        assert not re.search(r"ld\.global\.cg.*atom\.", ptx, re.DOTALL)
