"""The memory checker finds what it should, and nothing in correct kernels.

The kernels with faults are in faulty_kernels.py, which runs in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is no interpreter")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, str(ROOT / "tests/bench/faulty_kernels.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_copy", "one program", "last sums, acq_rel"])
def test_correct_kernels_pass(found: dict[str, str], name: str) -> None:
    assert found[name] == "unchecked 0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "_no_mask",
            r"_no_mask \(faulty_kernels\.py:\d+\) program 3: 4 bytes written .* past the end of `y`",
        ),
        ("_reads_before", "program 0: 4 bytes read outside the arguments, 4 bytes before the start of `x`"),
        ("_shifts_in_place", "race: .* program 1 writes element 32 of `x` that program 0 read"),
        ("_all_write_one", "race: .* program 1 writes element 0 of `y` that program 0 wrote"),
        ("_two_values", "program 0 stores two values to one element"),
        ("_plain_counter", "race: .* program 1 reads element 0 of `x` that program 0 wrote"),
        ("last sums, relaxed", "race: .* program 7 reads element 0 of `y` that program 0 wrote"),
        ("last sums, acquire", "race: .* program 7 reads element 0 of `y`"),
        ("last sums, release", "race: .* program 7 reads element 0 of `y`"),
        ("beyond a view", "4 bytes written outside the arguments, 0 bytes past the end of `x, y`"),
    ],
)
def test_faults_are_named(found: dict[str, str], name: str, message: str) -> None:
    assert re.search(message, found[name]), found[name]
