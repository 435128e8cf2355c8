"""A long campaign by hand: `python -m tests.fuzz --units 10` runs forty times what CI does.

--kind NAME          of one kind only
--case NUMBER        one case again, with its trace
--append             append the result to bench/results/fuzz.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from bench.environment import environment
from tests.fuzz.campaign import SEED, campaign, make, silence
from tests.fuzz.kinds import KINDS
from tests.tiny import make_tiny_sdxl

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "fuzz.jsonl"


def main() -> int:
    """Run, print what was found, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--units", type=int, default=10)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS])
    parser.add_argument("--case", type=int)
    parser.add_argument("--append", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    found = False
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            model = make_tiny_sdxl(Path(folder) / "model")
        for kind in KINDS:
            if args.kind not in (None, kind.name):
                continue
            made = make(kind, Path(folder) / "work", model)
            numbers = range(args.units * kind.weight) if args.case is None else [args.case]
            report = campaign(made, numbers, args.seed, alarm=True)
            found |= bool(report.found)
            for number, text in report.found.items():
                print(f"{kind.name} {number}: {text}\n")
            row = {
                "bench": "fuzz",
                "kind": kind.name,
                "seed": args.seed,
                "cases": len(numbers),
                **{name: report.ended[name] for name in ("accepted", "refused", "found")},
                "cpu_s": round(report.seconds, 1),
            }
            print(json.dumps(row), flush=True)
            if args.append:
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"environment": environment()}) + "\n")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
