"""What `train.best` keeps of the demo's runs at settings that train too far, beside the last step.

    python -m bench.best            → bench/results/best.jsonl, a row for each of three seeds
    python -m bench.best --few      → the same with 60 pairs of 12 prompts

The demo's full fine-tune at ten times its learning rate for three times its steps: MaPO at lr 5e-5 and
objective.beta 0.02, 300 steps, evaluated every 10. A fifth of the pairs is held out, since a tenth has fewer
prompts than `train.best` asks for. Start, best and last step are sampled with 96 seeds a set of prompts.
A row is accepted if the best step leaves the must-not-change score within 5 points of the start's and has at
least 1.5 times its preferred share; with too few prompts there is no best step to judge.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.environment import environment
from mapo_fast.data.prepare import prepare
from mapo_fast.demo import score, world
from mapo_fast.demo.run import TINY_SDXL, DemoSize, demo_config
from mapo_fast.models.open import open_sdxl
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit

RESULTS = Path(__file__).parent / "results" / "best.jsonl"
SETTINGS = (
    "optim.lr=5e-5", "objective.beta=0.02", "train.evaluate_every=10", "train.evaluate_pairs=64",
    "data.held_out=0.2",
)  # fmt: skip
STEPS, SAMPLES, SAMPLING_STEPS = 300, 96, 12
PROMPTS, EACH = 12, 5


def pairs_of(seed: int, few: bool) -> Iterable[Any]:
    """The demo's 288 pairs, or 60 of them with 12 prompts."""
    if not few:
        return world.preference_pairs(288, seed)
    drawn = sorted(world.preference_pairs(4000, seed), key=lambda pair: pair[0])
    groups = [list(group) for _, group in groupby(drawn, key=lambda pair: pair[0])]
    return [pair for group in groups[:: len(groups) // PROMPTS][:PROMPTS] for pair in group[:EACH]]


def figures(unet: Any, seed: int) -> dict[str, Any]:
    """Preferred share and must-not-change score, each with its interval."""
    folder = open_sdxl(TINY_SDXL)
    vae, found = folder.load_vae(), {}
    for name, with_colour, rule in (
        ("preferred_share", False, score.preferred),
        ("unchanged_score", True, score.correct),
    ):
        prompts = score.make_prompts(folder, with_colour=with_colour, count=SAMPLES, seed=seed, device="cpu")
        value, interval = score.share(score.sample(unet, vae, folder, prompts, SAMPLING_STEPS), prompts, rule)
        found[name] = {"value": value, "interval": list(interval)}
    return found


def measure(seed: int, few: bool, out: Path) -> dict[str, Any]:
    """One run's row."""
    config = demo_config(out, "mapo", seed, DemoSize(steps=STEPS), SETTINGS)
    world.write_preference_set(out / "pairs", pairs_of(seed, few), None)
    prepare(config)
    result = fit(config)
    unet = open_sdxl(TINY_SDXL).load_unet()
    rows: dict[str, Any] = {"start": {"step": 0, **figures(unet, seed)}}
    row: dict[str, Any] = {"bench": "best", "seed": seed, "pairs": "60 of 12 prompts" if few else "288"}
    folders = {"best": "best", "last": "checkpoints"}
    for name, folder in folders.items():
        checkpoints = sorted((config.train.output / folder).glob("step-*"))
        if checkpoints:
            unet.load_state_dict(load_file(checkpoints[-1] / "model.safetensors"))
            rows[name] = {"step": int(checkpoints[-1].name.removeprefix("step-")), **figures(unet, seed)}
            state = json.loads((checkpoints[-1] / "state.json").read_text(encoding="utf-8"))["state"]
            row |= {"reason": state["reason"]} if name == "best" else {}
    entries = read_log(result.log)
    row |= {"models": rows, "warnings": [e["message"] for e in entries if e["event"] == "warning"]}
    row["evaluations"] = [
        {key: e[key] for key in ("step", "accuracy", "margin_change", "chosen_error_change", "drift")}
        for e in entries
        if e["event"] == "evaluation"
    ]
    if "best" in rows:
        share, same = (
            {name: one[figure]["value"] for name, one in rows.items()}
            for figure in ("preferred_share", "unchanged_score")
        )
        kept = abs(same["best"] - same["start"]) <= 0.05
        row["accepted"] = kept and share["best"] >= 1.5 * share["start"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--few", action="store_true", help="60 pairs of 12 prompts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    accepted = True
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(seed, args.few, Path(folder))
        row["environment"] = environment()
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {n: (m["step"], *(m[f]["value"] for f in m if f != "step")) for n, m in row["models"].items()}
        print(seed, shown, row.get("accepted", "no best step"), flush=True)
        accepted = accepted and row.get("accepted", True)
    return 0 if accepted else 1


if __name__ == "__main__":
    raise SystemExit(main())
