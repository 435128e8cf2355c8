"""Whole steps of full SDXL on an NVIDIA GPU: providers and switches, the most telling first.

Every case runs in a process of its own, and its row goes to bench/results/train_step.jsonl as soon as it is
measured; what this GPU and commit have measured already is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench import ROOT
from bench.environment import environment
from bench.providers.switches import SWITCHES
from bench.providers.task import Task
from bench.step_tables import rows
from bench.train_step import RESULTS

SHORTEST = 45
"""Least seconds of a case; none is started later than this before the end."""


class Case(NamedTuple):
    """A provider at a task."""

    provider: str
    kind: str
    pairs: int
    checkpointing: bool

    def arguments(self) -> list[str]:
        """For `python -m bench.train_step`."""
        checkpointing = "--checkpointing" if self.checkpointing else "--no-checkpointing"
        return ["--provider", self.provider, "--kind", self.kind, "--pairs", str(self.pairs), checkpointing]


def cases() -> list[Case]:
    """Against the other recipes at 4 pairs and 1, each switch at 1, then a LoRA's base in fp8 at 4."""
    found = []
    for kind, pairs in (("full", 4), ("full", 1), ("lora", 4)):
        names = ["mapo_fast", "released", "diffusers"]
        if pairs == 4:
            names.append(f"dpo_{kind}")
        found += [Case(name, kind, pairs, False) for name in names]
    task = Task("sdxl", "full", 1, False, torch.device("cuda"))
    found.append(Case("diffusers, compiled", "full", 1, False))
    found += [Case(switch.provider, "full", 1, False) for switch in SWITCHES if switch.suits(task)]
    lora = replace(task, kind="lora", pairs=4)
    only = [switch for switch in SWITCHES if switch.kinds == ("lora",) and switch.suits(lora)]
    found += [Case(switch.provider, "lora", 4, False) for switch in only]
    return found


def run(deadline: float) -> int:
    """Measure missing cases until the time is up; returns the number of cases that fail or failed before."""
    stamp = environment()
    mine = [
        row
        for row in rows()
        if (row["environment"]["gpu"], row["environment"]["commit"]) == (stamp["gpu"], stamp["commit"])
    ]
    done = {Case(row["provider"], row["kind"], row["pairs"], row["checkpointing"]) for row in mine}
    failed = sum(map(_failed, mine))
    for case in cases():
        if case in done:
            continue
        left = deadline - time.monotonic()
        if left < SHORTEST:
            print("Time is up: run again to go on.", file=sys.stderr)
            break
        command = [sys.executable, "-m", "bench.train_step", "--size", "sdxl", *case.arguments(), "--json"]
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=left
            )
        except subprocess.TimeoutExpired:
            print(f"{case.provider}: not finished when the time was up; run again.", file=sys.stderr)
            break
        row: dict[str, Any] = case._asdict() | {"size": "sdxl", "device": "cuda"}
        if result.returncode == 0:
            row |= json.loads(result.stdout.splitlines()[-1])
        else:
            print(result.stderr[-4000:], file=sys.stderr)
            row["error"] = (result.stderr.strip().splitlines() or ["no message"])[-1]
        failed += _failed(row)
        print(json.dumps(row), flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"environment": stamp}) + "\n")
    return failed


def _failed(row: dict[str, Any]) -> bool:
    """Whether a row's case failed; running out of memory is a result, not a failure."""
    return "out of memory" not in row.get("error", "out of memory")
