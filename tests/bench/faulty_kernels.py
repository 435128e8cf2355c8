"""Kernels with a fault each, run in Triton's interpreter under the memory checker; prints what it found.

A program of its own, started by test_watch.py: the interpreter has to be on before Triton is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.watch import MemoryAccessError, MemoryChecker, watching

N = 100


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def _no_mask(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0))


@triton.jit
def _reads_before(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i - 1, mask=i < n, other=0), mask=i < n)


@triton.jit
def _shifts_in_place(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + 1, mask=i + 1 < n, other=0), mask=i < n)


@triton.jit
def _all_write_one(x, y, n, BLOCK: tl.constexpr):
    tl.store(y, tl.program_id(0).to(tl.float32))


@triton.jit
def _two_values(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2 + tl.program_id(0) * BLOCK, i.to(tl.float32))


@triton.jit
def _plain_counter(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.program_id(0), 1.0)
    if tl.load(x) == 0:
        tl.store(x, 1.0)


@triton.jit
def _last_sums(x, y, counter, BLOCK: tl.constexpr, SEM: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(y + program, program.to(tl.float32))
    if tl.atomic_add(counter, 1, sem=SEM) == programs - 1:
        i = tl.arange(0, BLOCK)
        tl.store(x, tl.sum(tl.load(y + i, mask=i < programs, other=0.0)))
        tl.store(counter, 0)


def _found(run: Callable[[], object]) -> str:
    checker = MemoryChecker()
    try:
        with watching(checker):
            run()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MemoryAccessError):
            cause = cause.__cause__
        if cause is None:
            raise
        return str(cause)
    assert checker.launches == 1
    return f"unchecked {checker.unchecked}"


def main() -> None:
    def run(kernel, *, programs: int = 4) -> str:  # type: ignore[no-untyped-def]
        x, y = torch.zeros(N), torch.zeros(N)
        return _found(lambda: kernel[(programs,)](x, y, N, BLOCK=32))

    def counted(sem: str) -> str:
        x, y, counter = torch.zeros(1), torch.zeros(8), torch.zeros(1, dtype=torch.int32)
        found = _found(lambda: _last_sums[(8,)](x, y, counter, BLOCK=8, SEM=sem))
        assert found != "unchecked 0" or (x.item() == 28 and counter.item() == 0)
        return found

    kernels = (
        _copy, _no_mask, _reads_before, _shifts_in_place, _all_write_one, _two_values, _plain_counter
    )  # fmt: skip
    found = {kernel.__name__: run(kernel) for kernel in kernels}
    found["one program"] = run(_shifts_in_place, programs=1)
    found |= {f"last sums, {sem}": counted(sem) for sem in ("acq_rel", "relaxed", "acquire", "release")}
    half = torch.zeros(2 * N)
    found["beyond a view"] = _found(lambda: _no_mask[(4,)](half[:N], half[:N], N, BLOCK=32))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
