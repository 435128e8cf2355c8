"""The demo over several seeds: `python -m bench.demo --seeds 0 1 2`.

Runs `mapo_fast.demo.run.run_demo` once per seed into a temporary folder and appends one row per seed to
`bench/results/demo.jsonl`: the figures of `report.json`, and
versions, CPU and git commit. Exit code 1 when a seed
misses the demo's acceptance: MaPO at least doubles the preferred share, is above the SFT control, and leaves
the must-not-change score within 5 points of its start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.environment import environment
from mapo_fast.demo.run import run_demo

RESULTS = Path(__file__).parent / "results" / "demo.jsonl"


def accepted(result: dict[str, Any]) -> bool:
    """Whether a report meets the three conditions above."""
    share, same = result["preferred_share"], result["unchanged_score"]
    doubled = share["mapo"] >= 2 * share["before"]
    return doubled and share["mapo"] > share["sft"] and abs(same["mapo"] - same["before"]) <= 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    failed = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = run_demo(Path(folder) / "demo", seed=seed)
        row = {"bench": "demo", **result, "accepted": accepted(result), "environment": environment()}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not accepted(result):
            failed.append(seed)
    print("accepted: all seeds" if not failed else f"NOT accepted: seeds {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
