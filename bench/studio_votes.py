"""What votes are worth: the demo's rule votes, wrongly one time in five, and a tiny SDXL is trained on them.

    python -m bench.studio_votes [--append] --rule RULE --votes N --seed S

The pool is `PROMPTS` captions that name no colour with a drawing in each of the four colours. The voter
prefers red to the others and the others to blue, calls it a tie otherwise, and is wrong in `WRONG` of the
votes. Rules for the next pair: `random`, as the studio has it, and `fewest`, which takes a prompt with the
fewest votes. The figure is the share of red among 96 samples of captions that name no colour.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from mapo_fast.data.prepare import prepare
from mapo_fast.demo import score, world
from mapo_fast.demo.run import TINY_SDXL
from mapo_fast.models.open import open_sdxl
from mapo_fast.run.train import fit
from mapo_fast.settings.load import parse_config
from mapo_fast.studio.pairs import draw

RESULTS = Path(__file__).parent / "results" / "studio.jsonl"
PROMPTS, WRONG, STEPS, SAMPLES = 44, 0.2, 100, 96
_RANKS = {world.CHOSEN: 2, world.REJECTED: 0}


def votes_of(rule: str, count: int, seed: int) -> list[tuple[str, world.Drawing, world.Drawing]]:
    """Caption, chosen and rejected drawing of the votes that were no ties."""
    rng = random.Random(f"votes {seed}")
    pool: dict[str, list[world.Drawing]] = {}
    while len(pool) < PROMPTS:
        drawing = world.random_drawing(rng)
        pool[drawing.caption(with_colour=False)] = [replace(drawing, colour=c) for c in world.COLOURS]
    members = {caption: list(range(4 * at, 4 * at + 4)) for at, caption in enumerate(pool)}
    seen: dict[str, set[tuple[int, int]]] = {}
    found = []
    for _ in range(count):
        fewest = min(len(seen.get(caption, ())) for caption in pool)
        others = {caption for caption in pool if len(seen.get(caption, ())) > fewest}
        drawn = draw(members, others if rule == "fewest" else (), seen, rng)
        assert drawn is not None
        seen.setdefault(drawn.prompt, set()).add((drawn.one, drawn.other))
        one, other = (pool[drawn.prompt][number % 4] for number in (drawn.one, drawn.other))
        ranks = [_RANKS.get(drawing.colour, 1) for drawing in (one, other)]
        wrong = rng.random() < WRONG
        if ranks[0] != ranks[1]:
            first = (ranks[0] > ranks[1]) != wrong
            found.append((drawn.prompt, *((one, other) if first else (other, one))))
    return found


def measure(rule: str, votes: int, seed: int) -> dict[str, Any]:
    """Vote, train and sample once."""
    pairs = votes_of(rule, votes, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        world.write_preference_set(out / "pairs", pairs)
        config = parse_config(
            {
                "model": {"path": TINY_SDXL},
                "data": {
                    "source": out / "pairs",
                    "cache": out / "cache",
                    "resolution": world.SIDE,
                    "bucket_step": world.SIDE,
                    "held_out": 0.1,
                },
                "objective": {"name": "mapo", "form": "code", "beta": 0.1, "snr": 0.5},
                "adapter": {"kind": "full"},
                "optim": {"lr": 5e-6, "warmup_steps": 20, "max_grad_norm": 1.0},
                "train": {
                    "output": out / "run",
                    "steps": STEPS,
                    "pairs_per_batch": 4,
                    "precision": "fp32",
                    "layout": "joint",
                    "gradient_checkpointing": False,
                    "threads": 1,
                    "seed": seed,
                    "checkpoint_every": 0,
                    "evaluate_every": 0,
                },
            }
        )
        prepare(config)
        fit(config)
        model = open_sdxl(TINY_SDXL)
        vae = model.load_vae()
        asked = score.make_prompts(
            model, with_colour=False, count=SAMPLES, seed=seed, device=torch.device("cpu")
        )
        shares = {}
        from diffusers import UNet2DConditionModel

        trained = UNet2DConditionModel.from_pretrained(out / "run" / "unet", local_files_only=True)
        for name, unet in (("before", model.load_unet()), ("after", trained)):
            samples = score.sample(unet, vae, model, asked, 12)
            shares[name] = sum(reading.colour == world.CHOSEN for reading in samples.readings) / SAMPLES
    return {
        "what": "votes",
        "rule": rule,
        "votes": votes,
        "wrong": WRONG,
        "pairs": len(pairs),
        "seed": seed,
        "preferred_share": shares,
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--rule", choices=("random", "fewest"), default="random")
    parser.add_argument("--votes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    row = measure(given.rule, given.votes, given.seed) | {"environment": environment()}
    print(json.dumps(row))
    if given.append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
