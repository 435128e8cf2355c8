"""SDPO's safeguard on the demo: the rejected gradient rescaled pair by pair, with and without.

    python -m bench.sdpo [--seeds 0 1 2]     → bench/results/sdpo.jsonl

Diffusion-SDPO (arXiv 2511.03317) scales the rejected image's gradient so that a step in output space does not
raise the chosen image's error to first order. With the residuals r = prediction − target of a pair and the
loss's derivatives c_w > 0, c_l < 0 by their mean squares e_w, e_l, the chosen error falls along
c_w·r_w + λ·c_l·r_l as long as

    λ ≤ c_w·⟨r_w, r_w⟩ / (−c_l·⟨r_w, r_l⟩),   where c_l·⟨r_w, r_l⟩ < 0; λ is at most 1.

The kernels stay as they are: λ multiplies the gradient of the rejected prediction in front of them. Each
objective trains the demo's model for 100 steps with the demo's settings and its own defaults, `mapo` with the
authors' β = 0.1, at which the chosen error rises.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.best import figures
from bench.environment import environment
from mapo_fast.data.prepare import prepare
from mapo_fast.demo import world
from mapo_fast.demo.run import TINY_SDXL, DemoSize, demo_config
from mapo_fast.models.open import open_sdxl
from mapo_fast.run import trainer
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit

RESULTS = Path(__file__).parent / "results" / "sdpo.jsonl"
OBJECTIVES = ("mapo", "dpo", "simpo")
SETTINGS = {"mapo": ["objective.beta=0.1"]}


class Safeguard:
    """A paired loss whose rejected gradient is scaled; keeps every λ."""

    def __init__(self, loss: Any, *, scale: bool) -> None:
        self.loss, self.scale = loss, scale
        self.scales: list[Tensor] = []

    def __call__(self, prediction: Tensor, target: Tensor, **given: Any) -> Any:
        scales = self._scales(prediction.detach(), target, given)
        self.scales.append(scales)
        if self.scale:
            chosen, rejected = prediction.chunk(2)
            each = scales.to(prediction.dtype).view(-1, 1, 1, 1)
            prediction = torch.cat([chosen, each * rejected + (1 - each) * rejected.detach()])
        return self.loss(prediction, target, **given)

    def _scales(self, prediction: Tensor, target: Tensor, given: dict[str, Any]) -> Tensor:
        chosen, rejected = (prediction - target).double().flatten(1).chunk(2)
        errors = [r.square().mean(dim=1).requires_grad_() for r in (chosen, rejected)]
        c_w, c_l = torch.autograd.grad(self.loss.from_errors(*errors, **given).loss, errors)
        pull = -c_l * (chosen * rejected).mean(dim=1)
        limit = c_w * errors[0].detach() / pull
        return torch.where(pull > 0, limit.clamp(max=1.0), torch.ones_like(limit))


def measure(objective: str, seed: int, out: Path, *, scale: bool) -> dict[str, Any]:
    """One run's row."""
    config = demo_config(out, objective, seed, DemoSize(), SETTINGS.get(objective, []))
    world.write_preference_set(out / "pairs", world.preference_pairs(288, seed), None)
    prepare(config)
    made: list[Safeguard] = []
    build = trainer.build_loss

    def safeguarded(*args: Any) -> Any:
        made.append(Safeguard(build(*args), scale=scale))
        return made[-1]

    trainer.build_loss = safeguarded
    try:
        result = fit(config)
    finally:
        trainer.build_loss = build
    scales = torch.cat(made[0].scales)
    unet = open_sdxl(TINY_SDXL).load_unet()
    [checkpoint] = (config.train.output / "checkpoints").iterdir()
    before = figures(unet, seed)
    unet.load_state_dict(load_file(checkpoint / "model.safetensors"))
    last = [e for e in read_log(result.log) if e["event"] == "evaluation"][-1]
    return {
        "bench": "sdpo",
        "objective": objective,
        "seed": seed,
        "scaled": scale,
        "below_1": float((scales < 1).double().mean()),
        "mean_scale": float(scales.mean()),
        "start": before,
        "end": figures(unet, seed),
        "chosen_error_change": last["chosen_error_change"],
        "margin_change": last["margin_change"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for objective in OBJECTIVES:
            for scale in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(objective, seed, Path(folder), scale=scale)
                row["environment"] = environment()
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                ends = [
                    round(row["end"][name]["value"], 3) for name in ("preferred_share", "unchanged_score")
                ]
                rise = row["chosen_error_change"]["mean"]
                print(seed, objective, scale, ends, f"{rise:+.5f}, below 1: {row['below_1']:.1%}", flush=True)


if __name__ == "__main__":
    main()
