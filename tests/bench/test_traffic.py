"""The bytes that ops move: the committed table meets the targets, and the counting counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to count")

from bench import traffic
from bench.dispatch import Untouched, size
from mapo_kernels.ops.geglu import geglu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return traffic.committed()


def factors(table: list[dict[str, Any]], op: str, name: str | None = None) -> dict[tuple[str, str], float]:
    """(Shape and dtype, pass) → bytes over the floor."""
    found = {
        (f"{row['shape']} {row['dtype']}", row["pass"]): row["bytes"] / row["floor_bytes"]
        for row in table
        if row["op"] == op and name in (None, row["pass"])
    }
    assert found
    return found


@pytest.mark.parametrize("op", ["paired_loss", "geglu", "adamw8bit", "paired_noise", "add_rounded"])
def test_element_wise_ops_move_the_least(table: list[dict[str, Any]], op: str) -> None:
    for where, factor in factors(table, op).items():
        assert factor <= 1.05, where


def test_layer_norm_moves_little_more(table: list[dict[str, Any]]) -> None:
    found = factors(table, "layer_norm")
    assert {shape for shape, _ in found} >= {"4×4096×640 bf16", "4×1024×1280 bf16"}
    for (shape, name), factor in found.items():
        limit = 1.05 if "frozen" in shape else 1.1 if "×4096×" in shape else 1.25
        if "fp32 parameters" in shape:
            limit += 0.01  # with bf16 activations: every program reads twice the bytes of weight and bias
        assert factor <= limit, (shape, name)


def test_group_norm_moves_two_passes_forward(table: list[dict[str, Any]]) -> None:
    for where, factor in factors(table, "group_norm_silu", "forward").items():
        assert factor <= 1.6, where
    for where, factor in factors(table, "group_norm_silu", "backward").items():
        assert factor <= 1.95, where  # 5/3, and partial sums; most where a map of 32² is channels_last


def test_the_loss_is_one_launch_each_way(table: list[dict[str, Any]]) -> None:
    launches = {(row["pass"], row["launches"]) for row in table if row["op"] == "paired_loss"}
    assert launches == {("forward", 1), ("backward", 1)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_table_is_of_these_kernels() -> None:
    """Counts again what counts fast; of the rest it compares the cases' names."""
    command = [sys.executable, "-m", "bench.traffic", "--check"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # it would start itself again to set this
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, str(ROOT / "tests/bench/counted_kernels.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_only_what_a_mask_lets_through_counts(counted: dict[str, dict[str, int]]) -> None:
    assert counted["100 fp32"] == {"bytes": 2 * 4 * 100, "launches": 1, "programs": 4, "counted": 4}
    assert counted["100 bf16"]["bytes"] == 2 * 2 * 100


@pytest.mark.slow
def test_a_sample_stands_for_equal_programs(counted: dict[str, dict[str, int]]) -> None:
    found = counted["10001 fp32"]
    assert found["bytes"] == 2 * 4 * 10001
    assert (found["programs"], found["counted"]) == (313, 96)


@pytest.mark.slow
def test_unequal_programs_are_all_counted(counted: dict[str, dict[str, int]]) -> None:
    assert counted["uneven"] == {
        "bytes": 2 * 4 * 9600 * 4 // 3,
        "launches": 1,
        "programs": 300,
        "counted": 300,
    }


@pytest.mark.slow
def test_atomic_operations_read_and_write(counted: dict[str, dict[str, int]]) -> None:
    assert counted["atomic"] == {"bytes": 2 * 4 * 500, "launches": 1, "programs": 500, "counted": 500}
    assert counted["off"] == {"bytes": 0, "launches": 0, "programs": 0, "counted": 0}


# --- PyTorch's own operations ---


def test_operations_move_their_inputs_and_outputs() -> None:
    x, y = torch.randn(300, 400), torch.randn(300, 400)
    bias = torch.randn(400)
    n = 4 * 300 * 400
    for work, expected, operations in (
        (lambda: x + y, 3 * n, 1),
        (lambda: x + bias, 2 * n + 4 * 400, 1),
        (lambda: x.t()[3:], 0, 0),
        (lambda: x.add_(y), 3 * n, 1),
        (lambda: x.copy_(y), 2 * n, 1),
        (lambda: torch.empty_like(x), 0, 0),
        (lambda: x.to(torch.bfloat16), n + n // 2, 1),
        (lambda: x.chunk(2)[0] * 2, n, 1),
        (lambda: F.linear(x, y), 2 * n + 4 * 300 * 300, 1),
        (lambda: bias.expand(300, 400) * 2, 4 * 400 + n, 1),
    ):
        with Untouched() as counter:
            work()
        assert (counter.bytes, counter.operations) == (expected, operations)


def test_large_results_are_not_computed_and_small_ones_are() -> None:
    huge = torch.empty(1 << 40, device="meta")
    assert size(huge) == 4 << 40
    x = torch.zeros(1 << 20).expand(1 << 12, 1 << 20)
    with Untouched() as counter:
        y = x.sum(1, keepdim=True) + x  # 16 GiB that nobody touches
        small = torch.arange(6, dtype=torch.int64) + 1
    assert y.shape == x.shape
    assert counter.operations == 3
    assert small.tolist() == [1, 2, 3, 4, 5, 6]


def test_operations_inside_a_custom_operator_count() -> None:
    """On the CPU GEGLU is plain torch inside its operator."""
    x = torch.randn(64, 128)
    with Untouched() as counter:
        y = geglu(x)
    assert counter.operations > 1
    torch.testing.assert_close(y, geglu(x))
