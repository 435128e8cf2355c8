"""Whole training steps side by side: this engine, the recipes that people use, and Diffusion-DPO.

    python -m bench.train_step                   what suits this machine: SDXL on an NVIDIA GPU, else tiny
    python -m bench.train_step --json            the same as JSON rows
    python -m bench.train_step --kind lora --pairs 4 --no-checkpointing --provider mapo_fast diffusers

Before any time, each provider's loss and gradients on one identical batch must agree with fp32 (fp64 at tiny
size) within the band of its own types (`bench.agreement`); if one does not, no time is printed and the exit
code is 1. Blocks of steps then alternate between the providers, so that whatever else the machine does meets
all of them. On a GPU each provider runs in a process of its own, one after another, with clean memory; the
rate of matrix products is measured in each.

Rows are appended to bench/results/train_step.jsonl with `--append`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, agreement, floors
from bench.environment import environment
from bench.flops import matrix_rate, model_flops
from bench.measure import copy_gbps
from bench.providers.base import Provider
from bench.providers.registry import PROVIDERS, names_for
from bench.providers.task import Task
from bench.split import Split, profiled

RESULTS = Path(__file__).parent / "results" / "train_step.jsonl"
BLOCKS = {"cpu": 40, "cuda": 5}
"""Blocks of steps per provider; medians and minima are taken over them."""
STEPS = {"cpu": 1, "cuda": 4}
"""Steps in a block."""
WARM_UP = 3
SHARES = ("idle", "update", "update_times_floor")
COPIED = 1 << 28
"""Bytes of the copy that the optimizer is compared with: more than an L2 cache holds, free on a full GPU."""


class DisagreementError(Exception):
    """A provider's results do not agree with the truth."""


class Runner:
    """A provider that agrees with the truth and is warmed up, and its measured steps."""

    def __init__(self, provider: Provider, agreed: agreement.Agreement) -> None:
        self.provider, self.agreed = provider, agreed
        self.split = Split(provider.task.device, provider.forwards)
        self.done = 0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.gpu = provider.task.device.type == "cuda"
        if self.gpu:  # and not after the warm-up: a graph allocates when it is captured, not in its replays
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            self.step()
        self.finish()

    def step(self) -> None:
        """Take one training step and mark its phases."""
        mark = self.split.mark
        mark("data")
        inputs = self.provider.data(self.done)
        mark("backward")  # until the UNet is called, and again afterwards
        self.provider.accumulate(inputs)
        mark("step")
        self.provider.update()
        mark("end")
        self.done += 1

    def finish(self) -> None:
        """Wait for the device and forget the marks."""
        self.split.take()

    def block(self, steps: int) -> None:
        """Time some steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        if self.gpu:
            torch.cuda.synchronize()
        self.wall.append(1e3 * (time.perf_counter() - wall) / steps)
        self.cpu.append(1e3 * (time.process_time() - cpu) / steps)
        self.phases.append({name: ms / steps for name, ms in self.split.take().items()})

    def cpu_ratio(self, other: Runner) -> float:
        """CPU time of its steps in multiples of another's, by the median over all blocks."""
        return round(statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=True)), 4)

    def _shares(self) -> dict[str, float | None]:
        """GPU times of a step; our optimizer's also as a multiple of the time to move its bytes."""
        shares = profiled(self.step)
        update_ms = shares.pop("update_ms")
        times_floor = None
        if update_ms:
            trained = [p for p in self.provider.unet.parameters() if p.requires_grad]
            gbps = copy_gbps(self.provider.task.device, COPIED)
            times_floor = round(update_ms / (1e-6 * floors.adamw8bit(trained) / gbps), 3)
        return {**shares, "update_times_floor": times_floor}

    def row(self, rate: float) -> dict[str, Any]:
        """The measurements as a JSON-able record."""
        provider, task = self.provider, self.provider.task
        flops = model_flops(task, provider.objective)
        ms = statistics.median(self.wall)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else None
        shares = self._shares() if self.gpu else dict.fromkeys(SHARES)
        return {
            "provider": provider.name,
            "size": task.size,
            "kind": task.kind,
            "pairs": task.pairs,
            "checkpointing": task.checkpointing,
            "device": task.device.type,
            "ms": round(ms, 3),
            "ms_least": round(min(self.wall), 3),
            "cpu_ms": round(statistics.median(self.cpu), 3),
            "cpu_ms_least": round(min(self.cpu), 3),
            "pairs_per_s": round(1e3 * task.pairs / ms, 4),
            "ms_per_pair": round(ms / task.pairs, 3),
            "model_tflop": flops / 1e12,
            "matrix_tflops": rate / 1e12,
            "mfu": round(flops / (1e-3 * ms) / rate, 4),
            "peak_gib": None if peak is None else round(peak, 3),
            **shares,
            "phases_ms": {
                name: round(statistics.median(block[name] for block in self.phases), 3)
                for name in self.phases[0]
            },
            "blocks": len(self.wall),
            "agreement": {name: float(value) for name, value in self.agreed._asdict().items()},
            "differences": list(provider.differences),
        }


def prepare(make: Callable[[Task], Provider], task: Task, objective: agreement.Objective) -> Runner:
    """Make a provider, check that it agrees with the truth, and warm it up.

    Raises:
        DisagreementError: it does not.
    """
    agreement.truth(task, objective)  # before the provider fills the device
    provider = make(task)
    agreed = agreement.check(provider)
    if not agreed.good:
        raise DisagreementError(
            f"{provider.name}: loss error {agreed.loss_error:.2e} (allowed {agreed.loss_allowed:.2e}), "
            f"gradient error {agreed.gradient_error:.2e} (allowed {agreed.gradient_allowed:.2e})"
        )
    if task.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return Runner(provider, agreed)


def measure(names: Sequence[str], task: Task, blocks: int) -> list[dict[str, Any]]:
    """Rows of the named providers, their blocks interleaved.

    Raises:
        DisagreementError: one of them computes something else; nothing has been timed then.
    """
    runners, wrong = [], []
    for name in names:
        make = PROVIDERS[name]
        try:
            runners.append(prepare(make, task, make.objective))
        except DisagreementError as error:
            wrong.append(str(error))
    if wrong:
        raise DisagreementError("; ".join(wrong))
    arithmetic = torch.bfloat16 if task.device.type == "cuda" else torch.float32
    rate = matrix_rate(task.device, arithmetic)
    for i in range(blocks):
        for j in range(len(runners)):
            runners[(i + j) % len(runners)].block(STEPS[task.device.type])
    rate = max(rate, matrix_rate(task.device, arithmetic))
    return [
        runner.row(rate) | {"cpu_ratio": runner.cpu_ratio(runners[0]), "cpu_ratio_to": names[0]}
        for runner in runners
    ]


def measure_apart(names: Sequence[str], arguments: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Measure each provider in its own process; returns the rows, and how many disagreed."""
    rows, wrong = [], 0
    for name in names:
        command = [sys.executable, "-m", "bench.train_step", *arguments, "--provider", name, "--json"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            continue
        wrong += 1
        print((result.stderr.strip().splitlines() or [f"{name}: no message"])[-1], file=sys.stderr)
    return rows, wrong


def text(row: dict[str, Any]) -> str:
    """A row as a line to read."""
    phases = ", ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items())
    more = "" if row["peak_gib"] is None else f", {row['peak_gib']:.2f} GiB, idle {row['idle']:.1%}"
    return (
        f"{row['provider']:36} {row['pairs_per_s']:9.3f} pairs/s  {row['ms_per_pair']:9.2f} ms per pair "
        f"(least {row['ms_least'] / row['pairs']:.2f})  MFU {row['mfu']:.1%}{more}; ms a step: {phases}"
    )


def append(rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to the results file, with their environment."""
    stamp = environment()
    with RESULTS.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row | {"environment": stamp}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--size", choices=("sdxl", "tiny"), help="sdxl on a GPU, else tiny")
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--pairs", type=int, default=1, help="pairs per step")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="recompute activations"
    )
    parser.add_argument("--provider", nargs="+", choices=tuple(PROVIDERS), metavar="NAME")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    parser.add_argument("--append", action="store_true", help="add the rows to the results file")
    args = parser.parse_args()
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no NVIDIA GPU (mapo-fast doctor says why)")
    for name in args.provider or ():
        if args.kind not in PROVIDERS[name].kinds:
            parser.error(f"--provider {name} is for --kind {PROVIDERS[name].kinds[0]}")
    warnings.simplefilter("ignore")  # third-party deprecations
    logging.disable(logging.WARNING)
    device = torch.device(args.device)
    task = Task(
        args.size or ("sdxl" if args.device == "cuda" else "tiny"),
        args.kind,
        args.pairs,
        args.checkpointing,
        device,
    )
    blocks = args.blocks or BLOCKS[args.device]
    names = args.provider or names_for(task)
    if args.device == "cuda" and len(names) > 1:
        same = ["--size", task.size, "--kind", task.kind, "--pairs", str(task.pairs)]
        same += ["--blocks", str(blocks)] + (["--checkpointing"] if task.checkpointing else [])
        rows, wrong = measure_apart(names, same)
    else:
        if args.device == "cpu":
            torch.set_num_threads(1)  # more gain little on a model this small, and lose much on busy cores
        try:
            rows, wrong = measure(names, task, blocks), 0
        except DisagreementError as error:
            print(f"no time: {error}", file=sys.stderr)
            return 1
    for row in [] if wrong else rows:
        print(json.dumps(row) if args.json else text(row), flush=True)
        if not args.json:
            for difference in row["differences"]:
                print(f"{'':38}{difference}")
    if args.append and not wrong:
        append(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
