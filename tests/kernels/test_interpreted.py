"""Run the kernel tests again with the real Triton kernels, in a process with Triton's interpreter on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to interpret")

ROOT = Path(__file__).parents[2]


def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "tests.interpreter"]
    command += ["-p", "no:cacheprovider", "tests/kernels/test_paired_loss.py", "tests/kernels/test_shim.py"]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    assert "skipped" not in summary, summary
    assert int(re.search(r"(\d+) passed", summary)[1]) > 150, summary
