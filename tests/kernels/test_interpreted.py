"""Run the kernel tests again with the real Triton kernels, in a process with Triton's interpreter on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to interpret")

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FILES = [
    "test_shim.py",
    *(
        p.name
        for p in sorted(HERE.glob("test_*.py"))
        if re.search(r"test_\w+\(\s*device: str", p.read_text("utf-8"))
    ),
]
"""The files that ask conftest's `device` fixture which implementation they run on."""
GROUPS = [FILES[i::4] for i in range(4)]
"""Several files in a process: half the time of one alone goes into imports, the compiler's too."""


def test_the_files_are_found() -> None:
    assert {"test_paired_loss.py", "test_philox.py"} <= set(FILES)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("files", GROUPS, ids=lambda files: f"{files[0]} and others")
def test_kernels_under_the_interpreter(files: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "tests.interpreter"]
    command += ["-p", "no:cacheprovider", *(f"tests/kernels/{file}" for file in files)]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    assert "skipped" not in summary, summary
    assert re.search(r"[1-9]\d* passed", summary), summary
