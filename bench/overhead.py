"""CPU time of the engine itself: its steps against those of a bare, tuned loop, on one CPU core.

    python -m bench.overhead [--append]

Tiny SDXL, one pair a step, no kernels: whatever the engine does besides the loop's own work shows here. Steps
of the two alternate, and CPU time is compared step by step, so that what else the machine does meets both;
the ratio is the median of all, and more steps are taken until its standard error is small enough.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.providers.base import Provider
from bench.providers.diffusers_loop import DiffusersLoop
from bench.providers.engine import MapoFast
from bench.providers.task import Task

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
TARGET = 0.95
LEAST, MOST = 40, 300
"""Rounds of one step each."""
PRECISE = 0.005
"""Standard error of the ratio at which measuring stops."""


def measure(
    engine: Provider, bare: Provider, precise: float = PRECISE, clear_of: float = math.inf
) -> dict[str, Any]:
    """The bare loop's CPU time over the engine's (1: the engine costs nothing) and its standard error.

    Args:
        engine: whose cost is asked.
        bare: what it is compared with.
        precise: standard error at which no more rounds are needed.
        clear_of: nor are any where the ratio is above this by four standard errors.
    """
    for i in range(3):
        _step(engine, i)
        _step(bare, i)
    ratios: list[float] = []
    times: dict[Provider, list[float]] = {engine: [], bare: []}

    def enough() -> bool:
        error = _standard_error(ratios)
        return error <= precise or statistics.median(ratios) - 4 * error >= clear_of

    while len(ratios) < MOST and (len(ratios) < LEAST or not enough()):
        order = (engine, bare) if len(ratios) % 2 else (bare, engine)
        for provider in order:
            begin = time.process_time()
            _step(provider, len(ratios) + 3)
            times[provider].append(1e3 * (time.process_time() - begin))
        ratios.append(times[bare][-1] / times[engine][-1])
    return {
        "ratio": round(statistics.median(ratios), 4),
        "standard_error": round(_standard_error(ratios), 4),
        "rounds": len(ratios),
        "engine_cpu_ms": round(statistics.median(times[engine]), 2),
        "bare_cpu_ms": round(statistics.median(times[bare]), 2),
        "engine_cpu_ms_least": round(min(times[engine]), 2),
        "bare_cpu_ms_least": round(min(times[bare]), 2),
    }


def _step(provider: Provider, number: int) -> None:
    provider.accumulate(provider.data(number))
    provider.update()


def _standard_error(ratios: list[float]) -> float:
    """Standard error of the median, from the quartiles as if the distribution were normal."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return math.sqrt(math.pi / 2) * (high - low) / 1.349 / math.sqrt(len(ratios))


def run(clear_of: float = math.inf) -> dict[str, Any]:
    """Measure on one thread; the process's number of threads is restored afterwards."""
    task, threads = Task("tiny", "full", 1, False, torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(MapoFast(task), DiffusersLoop(task), clear_of=clear_of)
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--append", action="store_true", help="add the row to the results file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # third-party deprecations
    logging.disable(logging.WARNING)
    row = run()
    print(json.dumps(row))
    if args.append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"environment": environment() | {"threads": 1}}) + "\n")
    return 0 if row["ratio"] >= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
