"""Bytes that each op moves, counted in Triton's interpreter: against the least possible, and PyTorch's.

    python -m bench.traffic             counts everything and prints a line per op, pass and shape
    python -m bench.traffic --json      the same as JSON rows
    python -m bench.traffic --write     replaces bench/results/traffic.jsonl
    python -m bench.traffic --check     what CI runs: counts the small cases again and compares

Kernels run with the grids and block sizes of an RTX 4090. Every element that a load or a store touches
counts each time, masked-out ones do not, an atomic operation counts as a read and a write. So caches are not
modelled: these are the bytes that programs ask for, not what reaches the memory. PyTorch operations inside an
op count too: their inputs once, their outputs once. `eager_bytes` is such a count of the plain PyTorch code.

A launch of many programs, none of which uses atomic operations, is counted by a sample: its first and last
programs and some in between. If those in between all moved the same, the rest is taken to have moved that
too; if not, all programs run. `programs` says how many there are and `programs_counted` how many ran.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import ROOT
from bench.cases import CASES, Case, New, cases, differentiable, least_bytes
from bench.dispatch import Untouched
from bench.watch import Watcher, watching
from mapo_kernels.hardware import INTERPRETING, Card, assume_card

RESULTS = Path(__file__).parent / "results" / "traffic.jsonl"
CARD, CARD_NAME = Card(89, 128), "RTX 4090"

ENDS, BETWEEN = 32, 32
"""Programs counted at each end of a large launch, and between them."""
SMALL = 200
QUICK = ("paired_loss", "paired_noise", "geglu", "geglu_linear", "lora_linear", "add_rounded")
"""Ops whose rows `--check` counts again if they have at most SMALL counted programs, a second or two each.
Other ops' programs take minutes in the interpreter."""


class Counter(Watcher):
    """Counts bytes by launch; while `on` is False, launches do nothing."""

    def __init__(self) -> None:
        self.on = False
        self.reset()

    def reset(self) -> None:
        self.bytes = self.launches = self.programs = self.counted = 0

    def launch(self, kernel: Callable[..., Any], arguments: dict[str, Any], programs: int) -> Sequence[int]:
        if not self.on:
            return ()
        self.launches += 1
        self.programs += programs
        self.all = programs
        self.moved: dict[int, int] = {}
        atomics = any(name.startswith("atomic") for name in kernel.__code__.co_names)
        self.sampled = programs > 2 * ENDS + BETWEEN and not atomics
        if not self.sampled:
            return range(programs)
        between = np.linspace(ENDS, programs - ENDS - 1, BETWEEN, dtype=int).tolist()
        return [*range(ENDS), *between, *range(programs - ENDS, programs)]

    def finished(self) -> Sequence[int] | None:
        if not self.on:
            return None
        missing = self.all - len(self.moved)
        between = [n for i, n in self.moved.items() if ENDS <= i < self.all - ENDS]
        if missing and len(set(between)) > 1:
            return [i for i in range(self.all) if i not in self.moved]
        self.bytes += sum(self.moved.values()) + (missing * between[0] if missing else 0)
        self.counted += len(self.moved)
        return None

    def program(self, number: int) -> None:
        self.current = number
        self.moved[number] = 0

    def load(self, addresses: np.ndarray, width: int) -> None:
        self.moved[self.current] += addresses.size * width

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        self.moved[self.current] += addresses.size * width

    def atomic(self, addresses: np.ndarray, width: int, acquires: bool, releases: bool) -> None:
        if self.sampled:
            raise RuntimeError("a kernel whose atomic operations its own body does not show was sampled")
        self.moved[self.current] += 2 * addresses.size * width


def count(case: Case) -> Iterator[dict[str, Any]]:
    """The case's rows, one per pass."""
    counter = Counter()
    with watching(counter), assume_card(CARD):
        ours = dict(_passes(case, "ours", counter))
    eager = dict(_passes(case, "eager", None))
    for name, figures in ours.items():
        op, shape, dtype = case.key
        yield {
            "op": op,
            "pass": name,
            "shape": shape,
            "dtype": dtype,
            "bytes": figures["bytes"],
            "floor_bytes": figures["floor"],
            "eager_bytes": eager[name]["bytes"],
            "launches": figures["launches"],
            "eager_launches": eager[name]["launches"],
            "programs": figures["programs"],
            "programs_counted": figures["counted"],
            "card": CARD_NAME,
        }


def _passes(case: Case, provider: str, counter: Counter | None) -> Iterator[tuple[str, dict[str, int]]]:
    new = New(torch.device("cpu"))
    with Untouched() as torch_operations:

        def figures(name: str, work: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
            torch_operations.bytes = torch_operations.operations = 0
            if counter is not None:
                counter.reset()
                counter.on = True
            result = work()
            found = {
                "bytes": torch_operations.bytes,
                "launches": torch_operations.operations,
                "programs": 0,
                "counted": 0,
            }
            if counter is not None:
                counter.on = False
                found["bytes"] += counter.bytes
                found["launches"] += counter.launches
                found |= {"programs": counter.programs, "counted": counter.counted}
            return result, found

        inputs = case.inputs(new)
        call = case.providers[provider](*inputs)
        outputs, forward = figures("forward", call)
        least = least_bytes(case, inputs, outputs)
        if outputs is None:
            yield "step", forward | {"floor": least["step"]}
            return
        yield "forward", forward | {"floor": least["forward"]}
        wanted = differentiable(outputs)
        if wanted:
            grads = new.like(wanted)
            leaves = differentiable(inputs)
            _, backward = figures("backward", lambda: torch.autograd.grad(wanted, leaves, grads))
            yield "backward", backward | {"floor": least["backward"]}


def committed() -> list[dict[str, Any]]:
    """The rows of the committed table."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def check() -> list[str]:
    """Differences from the committed table: names of rows, or figures of the rows that are fast to count."""
    table = {(row["op"], row["shape"], row["dtype"], row["pass"]): row for row in committed()}
    selected = cases(use="count")
    wrong = [
        f"{' '.join(case.key)}: not in the table"
        for case in selected
        if not any(key[:3] == case.key for key in table)
    ]
    names = {case.key for case in selected}
    wrong += [f"{' '.join(key)}: no longer a case" for key in table if key[:3] not in names]
    costs: dict[tuple[str, ...], int] = {}
    for key, row in table.items():
        costs[key[:3]] = costs.get(key[:3], 0) + row["programs_counted"]
    for case in selected:
        if case.op not in QUICK or costs.get(case.key, SMALL + 1) > SMALL:
            continue
        for row in count(case):
            was = table.get((row["op"], row["shape"], row["dtype"], row["pass"]))
            if row != was:
                wrong.append(f"counted {row}, the table has {was}")
    return wrong


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    floor = row["floor_bytes"]
    what = f"{row['op']:22} {row['pass']:9} {row['shape'] + ' ' + row['dtype']:52}"
    ours = f"{row['bytes'] / floor:7.3f} × floor, {row['launches']:3} launches"
    eager = f"eager {row['eager_bytes'] / floor:6.2f} ×, {row['eager_launches']:3}"
    counted = f"{row['programs_counted']} of {row['programs']} programs"
    print(f"{what} {floor / 2**20:9.2f} MiB {ours}; {eager}; {counted}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", default="all", choices=["all", *CASES])
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="count the small cases and compare")
    mode.add_argument(
        "--write", action="store_true", help="replace the committed table, or the op's rows of it"
    )
    args = parser.parse_args()
    if not INTERPRETING:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench.traffic", *sys.argv[1:]]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    torch.set_num_threads(1)
    if args.check:
        wrong = check()
        for line in wrong:
            print(line, file=sys.stderr)
        if wrong:
            print("After a deliberate change: python -m bench.traffic --write", file=sys.stderr)
        return 1 if wrong else 0
    rows = []
    for case in cases(args.op, "count"):
        for row in count(case):
            _show(row, args.json)
            rows.append(row)
    if args.write:
        kept = [row for row in committed() if args.op not in ("all", row["op"])] if RESULTS.exists() else []
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept + rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
