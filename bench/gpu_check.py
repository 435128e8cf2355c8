"""Everything that needs an NVIDIA GPU, in parts of at most eight minutes: `make gpu-check PART=ops`.

- `ops` runs the kernel tests on the GPU and then the microbenchmarks, the most telling first.
- `memory` runs the engine's tests on the GPU and then the memory table at full size, capped, next to the
  predictions, whose traces `python -m bench.gpu_memory --plan` makes beforehand.
- `step` measures whole training steps at full size: this engine, the recipes that people use, Diffusion-DPO,
  and every switch of the engine; what does not agree with fp32 is not timed.

Results are written as they come, under `bench/results/`; when the time is up, run it again to go on where it
stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench import gpu_memory, gpu_step, ops
from bench.environment import environment

HAS_GPU_TESTS = re.compile(r"test_\w+\(\s*device: str|mark\.gpu")
"""The `device` fixture of the kernels' tests, or the mark itself."""
GPU_BYTES_OF_TESTS = 10 * 2**30
"""Memory that a file's tests may allocate."""
SECONDS = 8 * 60
RESERVE = 20
"""Seconds before the end from which nothing new is started."""


def check_ops(deadline: float) -> int:
    """Tests of all kernels, then the microbenchmarks of the ops whose tests pass."""
    failed = _failed(ops.TESTS, deadline)
    again = ops.run("all", "cuda", tested=True, deadline=deadline, failed_files=failed)
    return 1 if again or failed else 0


def check_memory(deadline: float) -> int:
    """Tests of the engine and of `prepare`, then the memory table."""
    failed = [file for part in ("engine", "data") for file in _failed(ops.TESTS.parent / part, deadline)]
    return 1 if gpu_memory.run(deadline) or failed else 0


def _failed(folder: Path, deadline: float) -> list[str]:
    """Files of a folder whose GPU tests fail."""
    stamp = environment()
    print(f"{stamp['gpu']}, commit {stamp['commit']}", flush=True)
    files = [
        file
        for file in sorted(folder.glob("test_*.py"))
        if HAS_GPU_TESTS.search(file.read_text(encoding="utf-8"))
    ]
    # Most of a first run is importing torch and compiling kernels, on one core each.
    memory = torch.cuda.get_device_properties(0).total_memory
    beside = max(1, min((os.cpu_count() or 1) // 2, memory // GPU_BYTES_OF_TESTS))
    with ThreadPoolExecutor(beside) as pool:
        passed = list(pool.map(partial(ops.passed, device="cuda", stamp=stamp, deadline=deadline), files))
    failed = [file.name for file, ok in zip(files, passed, strict=True) if not ok]
    if failed:
        print(f"Not passed: {', '.join(failed)}", file=sys.stderr)
    return failed


def check_step(deadline: float) -> int:
    """Providers and switches of whole steps."""
    return 1 if gpu_step.run(deadline) else 0


CHECKS = {"ops": check_ops, "memory": check_memory, "step": check_step}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=tuple(CHECKS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    return CHECKS[args.part](time.monotonic() + SECONDS - RESERVE)


if __name__ == "__main__":
    raise SystemExit(main())
