"""Resources of every kernel on every card: registers, spills, shared memory; compiled without a GPU.

    python -m bench.resources             compiles everything and prints a line each
    python -m bench.resources --json      the same as JSON rows
    python -m bench.resources --one       one configuration of each kernel: does another Triton compile it
    python -m bench.resources --write     updates bench/results/resources.jsonl, except what got worse
    python -m bench.resources --check     what CI runs: the table is of today's kernels, and none is worse

The public ops really run, forward and backward, on untouched CPU memory, as on each card in turn. Triton's
own launch code specialises the arguments (1, multiples of 16, None) and is stopped where it would compile;
equal specialisations are compiled once. So what is compiled is what production launches.

Compiling everything takes minutes, so each row carries a digest of the kernel's source and specialisation:
`--check` compares all the digests, and compiles again one configuration of every kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.cases import CASES, Case, New, cases, differentiable, dtype_name
from bench.dispatch import Untouched
from mapo_kernels.hardware import INTERPRETING, Card, assume_card

RESULTS = Path(__file__).parent / "results" / "resources.jsonl"

CARDS = {
    75: Card(75, 68),  # RTX 2080 Ti
    80: Card(80, 108),  # A100
    86: Card(86, 82),  # RTX 3090
    89: Card(89, 128),  # RTX 4090
    90: Card(90, 132),  # H100
    100: Card(100, 148),  # B200
    120: Card(120, 170),  # RTX 5090
}
"""A card of each compute capability, with its multiprocessors."""

SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes a program may use, by compute capability; the compiler does not enforce it."""

NO_SPILLS_FROM = 80


def _no_line_numbers() -> contextlib.AbstractContextManager[Any]:
    """Leave the line number of a function out of Triton's cache key."""

    def keep(function: JITFunction, line: int) -> None:
        function.__dict__["starting_line_number"] = line

    zero = property(lambda _: 0, keep)
    return mock.patch.object(JITFunction, "starting_line_number", zero, create=True)


@dataclasses.dataclass(frozen=True)
class Job:
    """One specialisation of one kernel for one card."""

    kernel: JITFunction
    config: str
    cc: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def row(self) -> dict[str, Any]:
        """The row's fields that are known before compiling."""
        return {"kernel": self.name, "config": self.config, "cc": self.cc, "digest": self.digest}

    @property
    def digest(self) -> str:
        """Digest of all compiler inputs: source with all it calls, specialisation, options, card."""
        names = [name for name, _ in self.options["extern_libs"]]  # their paths depend on the machine
        options = self.options | {"extern_libs": names}
        with _no_line_numbers():
            source = self.kernel.cache_key
            constants = {at: getattr(value, "cache_key", value) for at, value in self.constants.items()}
        text = repr((source, self.cc, self.signature, constants, self.attributes, options))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _AbsentGpu:
    """Triton's driver as far as specialising a launch goes; the device's number is its capability."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_device(self) -> int:
        return self.cc

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)


def run_forward_and_backward(case: Case, new: New) -> None:
    outputs = differentiable(case.providers["ours"](*(inputs := case.inputs(new)))())
    if outputs:
        torch.autograd.grad(outputs, differentiable(inputs), new.like(outputs), allow_unused=True)


def launches(selected: Iterable[Case], ccs: Iterable[int] = tuple(CARDS)) -> list[Job]:
    """Every specialisation that these cases launch on these cards, named by the first case that does."""
    jobs: dict[str, Job] = {}
    new = New(torch.device("cpu"))
    label = ""

    def record(
        kernel: Any,
        key: Any,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        names = kernel.arg_names
        switches = {names[i]: constants[(i,)] for i, name in enumerate(names) if name.isupper()}
        shown = " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in switches.items())
        job = Job(
            kernel,
            f"{label}; {shown} warps={options.num_warps}",
            device,
            dict(signature),
            constants,
            attributes,
            dict(options.__dict__),
        )
        jobs.setdefault(job.digest, job)

    driver = triton.runtime.driver
    with (
        _no_line_numbers(),
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(driver, "_active", None),
    ):
        for cc in ccs:
            driver.set_active(_AbsentGpu(cc))
            with assume_card(CARDS[cc]), Untouched():
                for case in selected:
                    label = f"{dtype_name(case.dtype)} {case.shape}"
                    run_forward_and_backward(case, new)
    return _named_apart(jobs.values())


def _named_apart(jobs: Iterable[Job]) -> list[Job]:
    """Number configurations with equal names, which differ in alignment or in strides."""
    seen: dict[tuple[str, str, int], int] = {}
    apart = []
    for job in jobs:
        key = (job.name, job.config, job.cc)
        seen[key] = seen.get(key, 0) + 1
        suffix = f" #{seen[key]}" if seen[key] > 1 else ""
        apart.append(dataclasses.replace(job, config=job.config + suffix))
    return apart


def compile_job(job: Job) -> tuple[dict[str, Any], str]:
    """The job's row, and its PTX."""
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    log = io.StringIO()
    try:
        with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.compilation.always_compile = True  # a cache hit would skip ptxas and its log
            knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=GPUTarget("cuda", job.cc, 32), options=job.options)
    except Exception as error:
        return {**job.row, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}, ""
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    if registers is None:
        raise RuntimeError(f"ptxas said nothing about registers: {text!r}")
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
    shared = compiled.metadata.shared
    figures = {
        "registers": int(registers[1]),
        "spill_bytes": spills,
        "shared_bytes": shared,
        "ok": shared <= SHARED_MEMORY[job.cc] and (spills == 0 or job.cc < NO_SPILLS_FROM),
    }
    return job.row | figures | {"triton": triton.__version__}, compiled.asm["ptx"]


_jobs: list[Job] = []


def _compile_numbered(i: int) -> dict[str, Any]:
    return compile_job(_jobs[i])[0]


def compile_all(jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Rows in the order of the jobs; workers inherit the jobs by forking."""
    global _jobs
    _jobs = jobs
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_compile_numbered, range(len(jobs)))


def committed() -> list[dict[str, Any]]:
    """The rows of the committed table."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def worse(before: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> list[str]:
    """Rows that are not ok, or that spill more or need over 10 % more registers than before."""
    old = {(row["kernel"], row["config"], row["cc"]): row for row in before}
    found = []
    for row in now:
        where = f"{row['kernel']} on sm_{row['cc']} [{row['config']}]"
        was = old.get((row["kernel"], row["config"], row["cc"]), row)
        if not row["ok"]:
            found.append(f"{where}: not ok: {row}")
        elif row["spill_bytes"] > was.get("spill_bytes", row["spill_bytes"]):
            found.append(f"{where}: spills {was['spill_bytes']} -> {row['spill_bytes']} bytes")
        elif row["registers"] > 1.1 * was.get("registers", row["registers"]):
            found.append(f"{where}: registers {was['registers']} -> {row['registers']}")
    return found


def outdated(before: Iterable[dict[str, Any]], jobs: Iterable[Job]) -> list[str]:
    """Rows of the table that today's launches do not need, and launches that the table does not have."""
    old = {row["digest"]: row for row in before}
    today = {job.digest: job.row for job in jobs}
    return [
        f"{what}: {row['kernel']} on sm_{row['cc']} [{row['config']}]"
        for what, rows, others in (("not in the table", today, old), ("no longer launched", old, today))
        for digest, row in rows.items()
        if digest not in others
    ]


def one_of_each(jobs: Iterable[Job]) -> list[Job]:
    """The first configuration of every kernel, on one card each, which change from kernel to kernel."""
    first: dict[str, dict[int, Job]] = {}
    for job in jobs:
        first.setdefault(job.name, {}).setdefault(job.cc, job)
    return [list(on.values())[i % len(on)] for i, on in enumerate(first.values())]


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    figures = " ".join(
        f"{k}={row[k]}" for k in ("registers", "spill_bytes", "shared_bytes", "ok") if k in row
    )
    print(f"{row['kernel']:40} sm_{row['cc']:<4} {figures}  [{row['config']}]", flush=True)


def check(processes: int) -> list[str]:
    """Errors of the committed table: rows of other kernels than today's, or today's are worse."""
    table = committed()
    jobs = launches(cases(use="compile"))
    wrong = outdated(table, jobs)
    if {row["triton"] for row in table} != {triton.__version__}:
        table = []  # another compiler: its registers are not comparable, its failures and spills are
    return wrong + worse(table, compile_all(one_of_each(jobs), processes))


def update(processes: int, accept: bool) -> list[str]:
    """Compile rows that the table lacks and write them, except rows that got worse and are not accepted."""
    table = committed()
    known = {row["digest"]: row for row in table if row["ok"] and row["triton"] == triton.__version__}
    jobs = launches(cases(use="compile"))
    new = [job for job in jobs if job.digest not in known]
    for done, row in enumerate(compile_all(new, processes), 1):
        known[row["digest"]] = row
        print(f"{done}/{len(new)} ", end="", file=sys.stderr)
        _show(row, as_json=False)
    rows = [known[job.digest] | job.row for job in jobs]
    wrong = {row["digest"]: found for row in rows if (found := worse(table, [row]))}
    rows = [row for row in rows if accept or row["digest"] not in wrong]
    rows.sort(key=lambda row: (row["kernel"], row["config"], row["cc"]))
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [line for lines in wrong.values() for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", default="all", choices=["all", *CASES])
    parser.add_argument("--cc", type=int, nargs="+", default=list(CARDS), choices=CARDS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the committed table")
    mode.add_argument("--one", action="store_true", help="compile only one configuration of each kernel")
    mode.add_argument("--write", action="store_true", help="bring the committed table up to date")
    parser.add_argument("--accept", action="store_true", help="with --write: also where it gets worse")
    args = parser.parse_args()
    if INTERPRETING:
        parser.error("unset TRITON_INTERPRET: the interpreter and the compiler cannot share a process")
    if args.check:
        wrong = check(args.processes)
    elif args.write:
        wrong = update(args.processes, args.accept)
    else:
        wrong = []
        jobs = launches(cases(args.op, "compile"), args.cc)
        for row in compile_all(one_of_each(jobs) if args.one else jobs, args.processes):
            _show(row, args.json)
            wrong += worse([], [row])
    for line in wrong:
        print(line, file=sys.stderr)
    if args.check and wrong:
        print("After a deliberate change: python -m bench.resources --write", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
