"""The demo over several seeds, under every plan of the memory table, or with every objective.

    python -m bench.demo --seeds 0 1 2     → bench/results/demo.jsonl; of seed 0 docs/results/demo_seed0.png
    python -m bench.demo --plans           → bench/results/demo_plans.jsonl
    python -m bench.demo --objectives      → bench/results/demo_objectives.jsonl

Runs `mapo_fast.demo.run.run_demo` into a temporary folder and appends a row for each: the figures of
`report.json`, and versions, CPU and git commit. Exit code 1 when one misses the demo's acceptance: MaPO at
least doubles the preferred share, is above the SFT control, leaves the must-not-change score within 5 points
of its start, and does no harm: the chosen images' held-out error does not rise beyond its 95 % interval, and
the trainer does not warn. Runs under plans, whose optimizers and lengths differ, need not keep the last one.
Other objectives run with their defaults and are not judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.environment import environment
from bench.memory_table import ROWS
from mapo_fast.demo.run import DemoSize, run_demo
from mapo_kernels.objectives import objective_names

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parents[1] / "docs" / "results"
OBJECTIVES = tuple(name for name in objective_names() if name != "sft")
"""Objectives of the demo runs, without the control."""
FEWER = DemoSize(samples=96)
"""Samples per run: fewer than in the demo, because sampling takes most of the time."""
STEPS = {"train.steps": 150, "objective.beta": 0.1}
"""Steps with 8-bit states, where the margin grows more slowly than with the demo's own AdamW; and the MaPO
authors' β, with which models move more than with the demo's."""
LORA = {"optim.lr": 1.5e-4}
"""Learning rate of a LoRA, which moves less than all weights do with the same rate."""
NF4 = {"train.steps": 125}
"""Steps in nf4, where the start model differs and margins grow several times as fast (bench/LOG.md)."""


def accepted(result: dict[str, Any], *, harmless: bool) -> bool:
    """Whether a report meets the conditions above; `harmless`: the last one too."""
    share, same = result["preferred_share"], result["unchanged_score"]
    doubled = share["mapo"] >= 2 * share["before"]
    good = doubled and share["mapo"] > share["sft"] and abs(same["mapo"] - same["before"]) <= 0.05
    rise = result["held_out"]["mapo"]["chosen_error_change"]["low"]
    return good and (not harmless or (rise <= 0 and not result["warnings"]["mapo"]))


def of_plan(settings: dict[str, Any]) -> list[str]:
    """A row of the memory table as the demo's overrides, without two settings that the demo's config sets."""
    table = {"optim.name": "adamw8bit", "train.gradient_checkpointing": True} | STEPS | settings
    table |= LORA if settings["adapter.kind"] == "lora" else {}
    table |= NF4 if settings.get("adapter.base") == "nf4" else {}
    return [f"{name}={json.dumps(value)}" for name, value in table.items()]


class Job(NamedTuple):
    """One run of the demo."""

    file: str
    """Objective whose figures the row reports."""
    fields: dict[str, str]
    """Fields that begin the run's row."""
    objective: str = "mapo"
    overrides: Sequence[str] = ()
    size: DemoSize | None = None


def jobs(args: argparse.Namespace) -> list[Job]:
    """Options of the run."""
    if args.plans is not None:
        plans = {n: of_plan(settings) for n, _, _, settings in ROWS if n in args.plans or not args.plans}
        return [Job("demo_plans", {"plan": name}, overrides=sets, size=FEWER) for name, sets in plans.items()]
    if args.objectives:
        return [Job("demo_objectives", {}, name, size=FEWER) for name in OBJECTIVES]
    return [Job("demo", {})]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    which = parser.add_mutually_exclusive_group()
    names = [name for name, *_ in ROWS]
    which.add_argument(
        "--plans",
        nargs="*",
        choices=names,
        metavar="NAME",
        help="under each plan of the memory table, or some",
    )
    which.add_argument("--objectives", action="store_true", help="once with each objective")
    args = parser.parse_args()
    failed = []
    for seed, job in itertools.product(args.seeds, jobs(args)):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo"
            result = run_demo(out, seed=seed, objective=job.objective, overrides=job.overrides, size=job.size)
            if job.file == "demo" and seed == 0:
                shutil.copy(out / "report.png", PLOTS / "demo_seed0.png")
        fired = {model: [one["step"] for one in found] for model, found in result["warnings"].items()}
        row = {"bench": "demo", **job.fields, **result, "warnings": fired}
        if job.objective == "mapo":
            row["accepted"] = accepted(result, harmless=job.file == "demo")
        row["environment"] = environment()
        with (RESULTS / f"{job.file}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not row.get("accepted", True):
            failed.append(" ".join(["seed", str(seed), *job.fields.values()]))
    print("accepted: all" if not failed else f"NOT accepted: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
