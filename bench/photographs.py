"""Real photographs over several seeds: `python -m bench.photographs --seeds 0 1 2`.

Writes the pairs, prepares, trains and scores in a temporary folder and appends one row per seed to
`bench/results/photographs.jsonl`: per kind of degradation the held-out preference accuracy before and after,
and the paired change with its 95 % intervals. Exit code 1 when a kind shows no significant gain over pairs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.environment import environment
from mapo_fast.data.prepare import prepare
from mapo_fast.demo.photographs import print_scores, score_photographs, write_photographs
from mapo_fast.run.train import fit
from mapo_fast.settings.load import load_config
from mapo_fast.util.console import Terminal

RESULTS = Path(__file__).parent / "results" / "photographs.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    terminal = Terminal()
    without_gain = []
    for seed in args.seeds:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "photographs"
            config = load_config(write_photographs(out, seed))
            prepare(config, callbacks=terminal)
            fit(config, callbacks=terminal)
            scores = score_photographs(out)
        print_scores(scores, terminal.console)
        row = {
            "bench": "photographs",
            "seed": seed,
            "kinds": [asdict(score) for score in scores],
            "seconds": round(time.perf_counter() - started, 1),
            "environment": environment(),
        }
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        without_gain += [f"{score.kind} (seed {seed})" for score in scores if score.pairs_low <= 0]
    print(f"NO significant gain: {', '.join(without_gain)}" if without_gain else "every kind gained")
    return 1 if without_gain else 0


if __name__ == "__main__":
    raise SystemExit(main())
