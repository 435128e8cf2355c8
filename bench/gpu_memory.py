"""The memory table on an NVIDIA GPU: full SDXL steps with random weights, capped, beside the predictions.

    python -m bench.gpu_memory              all rows that this GPU and commit have not measured yet
    python -m bench.gpu_memory --row NAME   one row, here and now

Every row runs in a process of its own under a cap on reserved memory: the row's target, with what the planner
allows for workspaces and fragmentation. A row goes to bench/results/gpu_memory.jsonl as soon as it is
measured: most memory allocated and reserved, milliseconds a step, and the planner's prediction for this card.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.memory_table import GIB, ROWS, config_of
from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.precision import choose_precision
from mapo_fast.objectives import build_loss
from mapo_fast.planner.ask import card_of
from mapo_fast.planner.cards import CONTEXT_GIB, vram_for
from mapo_fast.planner.models import SDXL_UNET
from mapo_fast.planner.store import traces
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import pairs_of_zeros

RESULTS = Path(__file__).parent / "results" / "gpu_memory.jsonl"
WARM_UP, STEPS = 2, 4


def random_unet(dtype: torch.dtype) -> Any:
    """SDXL's UNet on the CPU with weights of a usual size."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(SDXL_UNET)
    unet = unet.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.dim() > 1:
                p.uniform_(-0.03, 0.03)
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet


def measure(name: str) -> dict[str, Any]:
    """Train some steps of one row and note what it took."""
    device = torch.device("cuda", torch.cuda.current_device())  # the cap needs an index
    target, settings = next((target, settings) for n, target, _, settings in ROWS if n == name)
    config = config_of(settings)
    cap = vram_for(int(target * GIB)) - int(CONTEXT_GIB * GIB)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    precision = choose_precision(config, device)
    parts = prepare_unet(random_unet(precision.base), config, precision, device)
    engine = Engine(config, parts, build_loss(config.objective, 1000), precision, device)
    inputs = pairs_of_zeros(config.train.pairs_per_batch, config.data.resolution // 8, SDXL_UNET)
    inputs = type(inputs)(*(x.to(device) for x in inputs))
    inputs = inputs._replace(noisy=torch.randn_like(inputs.noisy), target=torch.randn_like(inputs.target))
    for i in range(WARM_UP + STEPS):
        if i == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
        engine.start(1e-6)
        out = engine.accumulate(inputs, 1.0)
        engine.finish()
    torch.cuda.synchronize()
    ms = (time.perf_counter() - started) / STEPS * 1000
    return {
        "loss": float(out.loss),
        "ms": round(ms, 1),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "cap_gib": round(cap / GIB, 3),
    }


def predicted(name: str) -> dict[str, Any]:
    """What the planner says of the row on this card."""
    settings = next(settings for n, _, _, settings in ROWS if n == name)
    card = card_of(torch.device("cuda"))
    (trace,) = traces([config_of(settings)], SDXL_UNET)
    return {
        "predicted_gib": round(trace.peak / GIB, 3),
        "predicted_ms": round(simulate(trace, card).step, 1),
        "rates": card.rates.source,
    }


def run(deadline: float) -> int:
    """Measure what is missing until the time is up; the number of rows that failed."""
    stamp = environment()
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    done = set()
    if RESULTS.exists():
        for line in RESULTS.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if (row["environment"]["gpu"], row["environment"]["commit"]) == (stamp["gpu"], stamp["commit"]):
                done.add(row["name"])
    failed = 0
    for name, target, _, settings in ROWS:
        if name in done or vram_for(int(target * GIB)) > total * GIB:
            continue
        left = deadline - time.monotonic()
        if left < 60:
            print("Time is up: run again to go on.", file=sys.stderr)
            break
        row: dict[str, Any] = {"name": name, "plan": settings, "target_gib": target}
        command = [sys.executable, "-m", "bench.gpu_memory", "--row", name]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished when the time was up; run again to go on.", file=sys.stderr)
            break
        if result.returncode == 0:
            row |= json.loads(result.stdout.splitlines()[-1]) | predicted(name)
        else:
            failed += 1
            row["error"] = (result.stderr.strip().splitlines() or ["no message"])[-1]
        print(json.dumps(row), flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"environment": stamp}) + "\n")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--row", choices=[name for name, *_ in ROWS], help="measure only this one, here")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu_memory: there is no NVIDIA GPU here", file=sys.stderr)
        return 2
    if args.row is not None:
        print(json.dumps(measure(args.row)))
        return 0
    return 1 if run(time.monotonic() + args.seconds) else 0


if __name__ == "__main__":
    raise SystemExit(main())
