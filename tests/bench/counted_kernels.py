"""Kernels whose bytes are known, counted in Triton's interpreter; prints the counts.

A program of its own, started by test_traffic.py: the interpreter has to be on before Triton is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench import traffic
from bench.watch import watching


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def _uneven(x, y, n, BLOCK: tl.constexpr):
    """Every third program moves twice as much."""
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)
    if program % 3 == 0:
        tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def _count(x, y, n, BLOCK: tl.constexpr):
    tl.atomic_add(y, 1)


def _counted(run: Callable[[], object], on: bool = True) -> dict[str, int]:
    counter = traffic.Counter()
    counter.on = on
    with watching(counter):
        run()
    return {name: getattr(counter, name) for name in ("bytes", "launches", "programs", "counted")}


def main() -> None:
    def copied(kernel, n: int, dtype: torch.dtype) -> dict[str, int]:  # type: ignore[no-untyped-def]
        x, y = torch.arange(n).to(dtype), torch.zeros(n, dtype=dtype)
        found = _counted(lambda: kernel[(-(-n // 32),)](x, y, n, BLOCK=32))
        assert found["counted"] < found["programs"] or torch.equal(x, y)
        return found

    counter = torch.zeros(1, dtype=torch.int32)
    found = {
        "100 fp32": copied(_copy, 100, torch.float32),
        "100 bf16": copied(_copy, 100, torch.bfloat16),
        "10001 fp32": copied(_copy, 10001, torch.float32),
        "uneven": copied(_uneven, 9600, torch.float32),
        "atomic": _counted(lambda: _count[(500,)](counter, counter, 1, BLOCK=32)),
    }
    assert counter.item() == 500
    found["off"] = _counted(lambda: _count[(500,)](counter, counter, 1, BLOCK=32), on=False)
    assert counter.item() == 500
    print(json.dumps(found))


if __name__ == "__main__":
    main()
