"""How the cost of a step, and of starting, grows.

    python -m bench.scaling            all four; without a GPU the first three are predicted for --card
    python -m bench.scaling dataset    only this one
    python -m bench.scaling --append   keeps what it finds

- `pairs`        pairs per step, in one micro-batch: 1, 2, 4, 8, 16
- `resolution`   side of the images: 512 to 1536
- `accumulation` micro-batches of one pair per step: 1, 2, 4, 8, 16
- `dataset`      pairs in the data set, up to ten million: seconds and memory from opening the cache to the
                 first batch, measured in a process of its own

A step is SDXL's full fine-tune in bf16 weights with AdamW8bit, nothing recomputed; with --kind lora a LoRA's.
On an NVIDIA GPU steps run (`kind_of_figure` is "measured"); elsewhere a full trace of the engine's own step
is timed by the planner ("predicted"). With --append rows go to bench/results/scaling.jsonl, and the plots
next to it are drawn again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import ROOT
from bench.environment import environment
from bench.memory_table import GIB, config_of
from bench.random_cache import write_random_cache
from mapo_fast.data.cache import PairCache
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.hardware.names import find_card
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.planner.store import traces
from mapo_fast.planner.timeline import simulate
from mapo_fast.settings.schema import Config

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
PLOTS = Path(__file__).parents[1] / "docs" / "results"
VALUES: dict[str, tuple[int, ...]] = {
    "pairs": (1, 2, 4, 8, 16),
    "resolution": (512, 768, 1024, 1280, 1536),
    "accumulation": (1, 2, 4, 8, 16),
    "dataset": (10_000, 100_000, 1_000_000, 10_000_000),
}
SETTINGS = {
    "pairs": "train.pairs_per_batch",
    "resolution": "data.resolution",
    "accumulation": "train.accumulation",
}
LABELS = {
    "pairs": "pairs per step",
    "resolution": "image side, pixels",
    "accumulation": "micro-batches of one pair per step",
    "dataset": "pairs in the data set",
}
BUCKETS = [(1024, 1024), (832, 1216), (1216, 832)]
MEASURED_STEPS = 3


def settings(axis: str, value: int, kind: str) -> Config:
    """A step's config with one setting changed."""
    return config_of(
        {
            "adapter.kind": kind,
            "train.layout": "joint",
            "train.gradient_checkpointing": False,
            "train.fused_step": kind == "full" and axis != "accumulation",
            SETTINGS[axis]: value,
        }
    )


def predicted(axis: str, value: int, kind: str, card: str) -> dict[str, Any]:
    """Time and memory of a step as predicted by the planner.

    A trace has at most two micro-batches, since more need no more memory; each of them takes as long as the
    second did.
    """
    (trace,) = traces([settings(axis, value, kind)], SDXL_UNET)
    ms = simulate(trace, find_card(card)).step
    if axis == "accumulation" and value > 2:
        (one,) = traces([settings(axis, 1, kind)], SDXL_UNET)
        ms += (value - 2) * (ms - simulate(one, find_card(card)).step)
    return {
        "ms": round(ms, 1),
        "peak_gib": round(trace.peak / GIB, 3),
        "card": card,
        "kind_of_figure": "predicted",
    }


def measured(axis: str, value: int, kind: str) -> dict[str, Any]:
    """Time and memory of a step on this GPU."""
    from bench.gpu_memory import random_unet
    from mapo_fast.engine.build import prepare_unet
    from mapo_fast.engine.engine import Engine
    from mapo_fast.engine.objectives import build_loss
    from mapo_fast.engine.precision import choose_precision
    from mapo_fast.planner.trace import pairs_of_zeros

    device, config = torch.device("cuda"), settings(axis, value, kind)
    precision = choose_precision(config, device)
    parts = prepare_unet(random_unet(precision.base), config, precision, device)
    engine = Engine(config, parts, build_loss(config.objective, 1000), precision, device)
    inputs = pairs_of_zeros(config.train.pairs_per_batch, config.data.resolution // 8, SDXL_UNET)
    inputs = type(inputs)(*(x.to(device) for x in inputs))
    inputs = inputs._replace(noisy=torch.randn_like(inputs.noisy), target=torch.randn_like(inputs.target))
    for step in range(2 + MEASURED_STEPS):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
        engine.start(1e-6)
        for _ in range(config.train.accumulation):
            engine.accumulate(inputs, 1 / config.train.accumulation)
        engine.finish()
    torch.cuda.synchronize()
    return {
        "ms": round(1e3 * (time.perf_counter() - begin) / MEASURED_STEPS, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "card": torch.cuda.get_device_name(),
        "kind_of_figure": "measured",
    }


def started(folder: Path) -> dict[str, Any]:
    """Open a cache as `train` does, plan, and load the first batch; returns seconds and memory."""
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    cache = PairCache.open(folder)
    batches = MicroBatches(cache.train, 4, seed=0)
    cache.batch(batches.at(0)[1], flip=None, drop=None)
    seconds = time.perf_counter() - begin
    for position in range(1, 200):  # an epoch's order must not grow either
        batches.at(position * batches.per_epoch // 100)
    grown = psutil.Process().memory_info().rss - before
    return {"seconds": round(seconds, 3), "grown_mib": round(grown / 2**20, 1), "kind_of_figure": "measured"}


def dataset(pairs: int) -> dict[str, Any]:
    """Start with so many pairs on disk, in a new process."""
    folder = Path(tempfile.mkdtemp(prefix="mapo_fast_bench_"))
    try:
        write_random_cache(
            folder / "cache", pairs, BUCKETS, vae_factor=8, text_widths=(768, 1280), pooled=1280
        )
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        return _apart(["--start", str(folder / "cache")]) | {"cache_mib": round(size / 2**20, 1)}
    finally:
        shutil.rmtree(folder)


def _apart(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.scaling", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"error": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(result.stdout.splitlines()[-1]))


def row(axis: str, value: int, kind: str, card: str) -> dict[str, Any]:
    """One point of one curve."""
    if axis == "dataset":
        return {"axis": axis, "value": value} | dataset(value)
    point = {"axis": axis, "value": value, "kind": kind}
    if torch.cuda.is_available():
        return point | _apart(["--measure", axis, str(value), "--kind", kind])
    return point | predicted(axis, value, kind, card)


def plot(rows: list[dict[str, Any]], folder: Path = PLOTS) -> list[Path]:
    """A picture per axis: the newest point of each value, by card."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for axis in VALUES:
        curves: dict[str, dict[int, dict[str, Any]]] = {}
        for point in rows:
            if point["axis"] == axis and "error" not in point:
                name = point.get("card", point["environment"]["cpu"])
                curves.setdefault(f"{name}, {point['kind_of_figure']}", {})[point["value"]] = point
        if not curves:
            continue
        above, below = ("seconds", "grown_mib") if axis == "dataset" else ("ms", "peak_gib")
        names = {"seconds": "seconds to the first batch", "grown_mib": "memory, MiB"}
        names |= {"ms": "ms per pair", "peak_gib": "peak memory, GiB"}
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2))
        for panel, name in zip(panels, (above, below), strict=True):
            for label, points in curves.items():
                x = sorted(points)
                share = {v: v if name == "ms" and axis != "resolution" else 1 for v in x}
                panel.plot(x, [points[v][name] / share[v] for v in x], marker="o", label=label)
            panel.set_xscale("log")
            panel.set_xticks(x, [f"{v:,}" for v in x], fontsize=7)
            panel.minorticks_off()
            panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
            panel.set_xlabel(LABELS[axis])
            panel.set_ylabel(names[name])
        panels[0].legend(fontsize=7)
        figure.suptitle(_title(axis, curves), fontsize=9)
        figure.tight_layout()
        path = folder / f"scaling_{re.sub('[^a-z]', '_', axis)}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


def _title(axis: str, curves: Iterable[str]) -> str:
    """Caption of a plot: its quantity, the machine, and whether it was measured."""
    what = "Start of training" if axis == "dataset" else "Training step of SDXL, one GPU"
    return f"{what}: {'; '.join(curves)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("axis", nargs="*", metavar="AXIS", help=f"only these of {', '.join(VALUES)}")
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--card", default="H100 80GB", help="for which times are predicted without a GPU")
    parser.add_argument("--values", type=int, nargs="+", help="only these values")
    parser.add_argument(
        "--append", action="store_true", help="add the rows to the results file, draw it anew"
    )
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # third-party deprecations
    logging.disable(logging.WARNING)
    if args.start is not None:
        print(json.dumps(started(args.start)))
        return
    if args.measure is not None:
        print(json.dumps(measured(args.measure[0], int(args.measure[1]), args.kind)))
        return
    unknown = [axis for axis in args.axis if axis not in VALUES]
    if unknown:
        parser.error(f"no axis {', '.join(unknown)}: choose from {', '.join(VALUES)}")
    for axis in args.axis or VALUES:
        for value in args.values or VALUES[axis]:
            found = row(axis, value, args.kind, args.card)
            print(json.dumps(found), flush=True)
            if args.append:
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found | {"environment": environment()}) + "\n")
    if not args.append:
        return
    for path in plot([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]):
        print(path)


if __name__ == "__main__":
    main()
