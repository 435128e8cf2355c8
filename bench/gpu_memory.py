"""The planner's promises on an NVIDIA GPU: steps of full SDXL with random weights, compared with predictions.

    python -m bench.gpu_memory --plan   beforehand, on any machine: makes the traces, kept in build/cache
    python -m bench.gpu_memory          measures what this GPU and commit have not measured yet

Two kinds of rows go to bench/results/gpu_memory.jsonl as soon as they are measured:

- `row`: a row of `bench.memory_table`: its memory has to be within 5 % of the prediction, what torch reserves
  within 5 % of the replay, and its time within 25 % of the prediction by this GPU's measured rates.
- `ranking`: the planner's three fastest plans that fit a budget have to rank as predicted.
- `allocator`: the first row with torch's own settings and with expandable segments, each under the least cap
  at which the replay says that it runs; it has to run.

Every plan runs in a process of its own under a cap on reserved memory: what the replay says that it reserves,
or the budget, with what the planner allows for cuDNN's workspaces.

The planner predicts the bytes of tensors. torch's allocator also holds the workspaces of cuBLAS, which the
replay counts. They are measured and taken off before allocated bytes are compared. Those of cuDNN are there
only while a convolution runs, and count as error. The CUDA context is in no figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.environment import environment
from bench.measure import quantiles
from bench.memory_table import GIB, ROWS, config_of
from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import choose_precision
from mapo_fast.hardware import gpu
from mapo_fast.hardware.allocator import Rules
from mapo_fast.hardware.cards import CONTEXT_GIB, Card, vram_for
from mapo_fast.hardware.gpu import planned_rules
from mapo_fast.hardware.host import host
from mapo_fast.hardware.names import find_card
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.planner.ask import card_of
from mapo_fast.planner.replay import Allocator, Replays, cublas_workspace, reserved
from mapo_fast.planner.search import search
from mapo_fast.planner.store import traces
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import pairs_of_zeros

RESULTS = Path(__file__).parent / "results" / "gpu_memory.jsonl"
CACHE = Path(__file__).parents[1] / "build" / "cache"
MEMORY, TIME = 0.05, 0.25
"""How far a measured figure may be from the predicted one."""
WARM_UP, STEPS = 2, 7
NOISE = 0.01
"""Relative difference below which times count as equal; larger where a plan's own steps differ by more."""
EQUAL = 0.005
"""Relative difference below which predictions are not ranked: the planner says «no faster»."""
RAM = 64 * GIB

RANKINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "full in 12 GiB": (12, {"adapter.kind": "full"}),
    "LoRA in 12 GiB": (12, {"adapter.kind": "lora", "adapter.rank": 16}),
}
"""GiB, settings. With more memory the fastest plans are one plan with two names (fused or not)."""

FIRST = (
    "full, checkpointed",
    "LoRA, bf16 base, sequential",
    "full in 12 GiB",
    "full, no matrix product recomputed",
    "full, everything streamed",
    "LoRA in 12 GiB",
)
"""Rows to measure first; the others follow."""

ALLOCATORS = {"full, checkpointed, default segments": False, "full, checkpointed, expandable segments": True}
"""Values of the allocator setting to measure: with and without expandable segments."""


def names() -> list[str]:
    """All measurements, in order."""
    return [*FIRST, *ALLOCATORS, *(name for name, *_ in ROWS if name not in FIRST)]


def _row(name: str) -> tuple[float, dict[str, Any]]:
    """Target in GiB, and settings, of a row."""
    return next((target, settings) for row, target, _, settings in ROWS if row == name)


def budget(name: str, plan: dict[str, Any]) -> int:
    """Bytes of a card that a plan of this name may use, with the CUDA context."""
    if name in RANKINGS:
        return RANKINGS[name][0] * GIB
    reserved_gib = plan["least_cap_gib"] if name in ALLOCATORS else plan["predicted_reserved_gib"]
    return vram_for(int(reserved_gib * GIB))


# --- Prediction ---


def predict(name: str, card: Card) -> list[dict[str, Any]]:
    """The plan of a row, or the three fastest of a budget, fastest first."""
    if name not in RANKINGS:
        settings = _row(FIRST[0] if name in ALLOCATORS else name)[1]
        (trace,) = traces([config_of(settings)], SDXL_UNET)
        rules = Rules(expandable=ALLOCATORS.get(name, planned_rules().expandable))
        allocator = Allocator(rules, cublas_workspace(card.capability))
        sizes = trace.peak, reserved(trace, allocator)
        found = _prediction(settings, *sizes, simulate(trace, card).step, card)
        if name in ALLOCATORS:
            found["least_cap_gib"] = round(Replays().least(trace, allocator) / GIB, 3)
        return [found]
    gib, asked = RANKINGS[name]
    config, rules = config_of(asked), planned_rules()
    outcome = search(config, SDXL_UNET, card, gib * GIB, host(RAM), rules=rules)
    plans = [plan for plan in [outcome.chosen, *(loser.plan for loser in outcome.others)] if plan is not None]
    fitting = [
        plan
        for plan in plans
        if plan.reserved <= outcome.usable and plan.pinned <= outcome.host.pinnable and plan.host <= RAM
    ]
    fastest = sorted(fitting, key=lambda plan: plan.ms)[:3]
    return [_prediction(asked | plan.settings, plan.peak, plan.reserved, plan.ms, card) for plan in fastest]


def _prediction(settings: dict[str, Any], peak: int, held: int, ms: float, card: Card) -> dict[str, Any]:
    return {
        "plan": settings,
        "predicted_gib": round(peak / GIB, 3),
        "predicted_reserved_gib": round(held / GIB, 3),
        "predicted_ms": round(ms, 1),
        "rates": card.rates.source,
    }


# --- Measurement, in a process of its own ---


def random_unet(dtype: torch.dtype) -> Any:
    """SDXL's UNet on the CPU, with random weights of typical magnitude."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(SDXL_UNET)
    for p in unet.parameters():
        p.data = p.data.to(dtype)
    unet.to_empty(device="cpu")
    pool = torch.empty(1 << 22).uniform_(-0.03, 0.03).to(dtype)  # drawing all would take half a minute
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.dim() > 1:
                for part in p.view(-1).split(pool.numel()):
                    part.copy_(pool[: part.numel()])
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet


def measure(settings: dict[str, Any], cap: int, device: torch.device, unet: Any = None) -> dict[str, Any]:
    """Train some steps of a plan and record their time and memory.

    Args:
        cap: bytes that torch's allocator may reserve.
        unet: on the CPU; SDXL's by default.

    Raises:
        RuntimeError: out of memory, or a loss that is none: such a step updates nothing.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        gpu.choose_rules(device)
        gpu.cap(cap, device)
    config = config_of(settings)
    precision = choose_precision(config, device)
    unet = random_unet(precision.base) if unet is None else unet
    parts = prepare_unet(unet, config, precision, device)
    engine = Engine(config, parts, build_loss(config.objective, 1000), precision, device)
    zeros = pairs_of_zeros(config.train.pairs_per_batch, config.data.resolution // 8, unet.config)
    inputs = type(zeros)(*(x.to(device) for x in zeros))
    inputs = inputs._replace(noisy=torch.randn_like(inputs.noisy), target=torch.randn_like(inputs.target))

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    times = []
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times.append(now())
        engine.start(1e-6)
        out = engine.accumulate(inputs, 1.0)
        engine.finish()
        if step >= WARM_UP:
            times.append(now())
    loss = float(out.loss.detach())
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    pairs = itertools.pairwise(times)
    ms = quantiles([a.elapsed_time(b) if on_gpu else 1e3 * (b - a) for a, b in pairs])
    found = {"loss": loss, "ms": round(ms.p50, 2), "ms_p20": round(ms.p20, 2), "ms_p80": round(ms.p80, 2)}
    return found | (_memory() if on_gpu else {})


def _memory() -> dict[str, float]:
    """Peak GiB of the process so far."""
    most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.synchronize()
    with_workspaces = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    sizes = (*most, with_workspaces - torch.cuda.memory_allocated())
    names = "allocated_gib", "reserved_gib", "workspaces_gib"
    return {name: round(size / GIB, 3) for name, size in zip(names, sizes, strict=True)}


# --- Verdicts ---


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A measured plan with its errors relative to the predictions, and whether they are small enough."""
    memory = (row["allocated_gib"] - row["workspaces_gib"]) / row["predicted_gib"] - 1
    held = row["reserved_gib"] / row["predicted_reserved_gib"] - 1
    seconds = row["ms"] / row["predicted_ms"] - 1
    return row | {
        "memory_error": round(memory, 4),
        "reserved_error": round(held, 4),
        "time_error": round(seconds, 4),
        "memory_ok": abs(memory) <= MEMORY,
        "reserved_ok": abs(held) <= MEMORY,
        "time_ok": abs(seconds) <= TIME,
    }


def ranked(plans: list[dict[str, Any]]) -> str:
    """Whether plans, the fastest by prediction first, rank as measured.

    Every two whose predictions differ are compared. Nothing is said of two whose measured times differ by
    no more than the noise.

    Returns:
        "as predicted", "reversed", or "tied" where no two can be told apart.
    """
    found = set()
    for a, b in itertools.combinations(plans, 2):
        if b["predicted_ms"] <= a["predicted_ms"] * (1 + EQUAL):
            continue
        noise = max(NOISE * a["ms"], *(plan["ms_p80"] - plan["ms_p20"] for plan in (a, b)))
        if abs(b["ms"] - a["ms"]) > noise:
            found.add("as predicted" if b["ms"] > a["ms"] else "reversed")
    return "reversed" if "reversed" in found else "as predicted" if found else "tied"


def missed(row: dict[str, Any]) -> list[str]:
    """Fields that a row of the results file leaves out."""
    if "error" in row:
        return ["an error"]
    if row["kind"] == "ranking":
        return ["ranking"] if row["ranked"] == "reversed" else []
    if row["kind"] == "allocator":
        return []  # it ran
    return [name for name in ("memory", "reserved", "time") if not row[f"{name}_ok"]]


def line(row: dict[str, Any]) -> str:
    """A row as text, a line for each plan."""
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    if row["kind"] == "ranking":
        plans = [f"  {_figures(plan)}" for plan in row["plans"]]
        return "\n".join([f"{row['name']}: {row['ranked']}", *plans])
    verdict = f"MISSED: {' and '.join(missed(row))}" if missed(row) else "ok"
    return f"{row['name']}: {_figures(row)}; {verdict}"


def _figures(plan: dict[str, Any]) -> str:
    return (
        f"{plan['allocated_gib']:.2f} GiB, {plan['workspaces_gib']:.2f} of it workspaces (predicted "
        f"{plan['predicted_gib']:.2f}: {plan['memory_error']:+.1%}), {plan['reserved_gib']:.2f} reserved "
        f"(predicted {plan['predicted_reserved_gib']:.2f}: {plan['reserved_error']:+.1%}); "
        f"{plan['ms']:.0f} ms (predicted {plan['predicted_ms']:.0f}: {plan['time_error']:+.1%})"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts of rows within and outside the tolerances."""
    plans = [row for row in rows if row["kind"] == "row"]
    rankings = [row.get("ranked", "not measured") for row in rows if row["kind"] == "ranking"]
    good = {
        name: sum(row.get(f"{name}_ok", False) for row in plans) for name in ("memory", "reserved", "time")
    }
    capped = [row for row in rows if row["kind"] == "allocator"]
    return (
        f"memory within {MEMORY:.0%}: {good['memory']} of {len(plans)} rows; reserved within {MEMORY:.0%}: "
        f"{good['reserved']}; time within {TIME:.0%}: {good['time']}; rankings: "
        f"{', '.join(rankings) or 'none'}; under the least cap "
        f"{sum('error' not in row for row in capped)} of {len(capped)} run; "
        f"{len(names()) - len(rows)} of {len(names())} not measured"
    )


# --- All of it ---


def use_own_cache() -> None:
    """Keep traces and rates in the working tree, so that they can be copied to another machine with it."""
    os.environ["XDG_CACHE_HOME"] = str(CACHE)


def run(deadline: float, results: Path = RESULTS) -> int:
    """Measure missing rows until the time is up; returns how many of this GPU's and commit's rows fail."""
    use_own_cache()
    stamp = environment()
    total = torch.cuda.get_device_properties(0).total_memory
    mine = (stamp["gpu"], stamp["commit"])
    card = card_of(torch.device("cuda"))
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(text) for text in lines]
    rows = [row for row in rows if (row["environment"]["gpu"], row["environment"]["commit"]) == mine]
    done = {row["name"] for row in rows}
    for name in names():
        if name in done:
            continue
        if time.monotonic() > deadline - 30:
            print("Time is up: run again to go on.", file=sys.stderr)
            break
        kind = "ranking" if name in RANKINGS else "allocator" if name in ALLOCATORS else "row"
        row: dict[str, Any] = {"kind": kind, "name": name}
        plans = predict(name, card)
        if max(budget(name, plan) for plan in plans) > total:
            print(f"{name}: does not fit this GPU", flush=True)
            continue
        try:
            row |= _measured(name, plans, deadline)
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished when the time was up; run again to go on.", file=sys.stderr)
            break
        except subprocess.CalledProcessError as error:
            print(error.stderr[-4000:], file=sys.stderr)
            row["error"] = (error.stderr.strip().splitlines() or ["no message"])[-1]
        rows.append(row)
        print(line(row), flush=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"environment": stamp}) + "\n")
    print(summary(rows), flush=True)
    return sum(bool(missed(row)) for row in rows)


def _measured(name: str, predicted: list[dict[str, Any]], deadline: float) -> dict[str, Any]:
    """Measure the plans of one name."""
    plans = []
    for plan in predicted:
        cap = budget(name, plan) - int(CONTEXT_GIB * GIB)
        found = _alone(plan["plan"], cap, deadline, ALLOCATORS.get(name))
        plans.append(judged(plan | {"cap_gib": round(cap / GIB, 3)} | found))
    if name in RANKINGS:
        return {"plans": plans, "ranked": ranked(plans)}
    return {"target_gib": _row(FIRST[0] if name in ALLOCATORS else name)[0]} | plans[0]


def _alone(
    settings: dict[str, Any], cap: int, deadline: float, expandable: bool | None = None
) -> dict[str, Any]:
    """Run `measure` in its own process, with the allocator settings of a run unless others are given."""
    environment = dict(os.environ)
    if expandable is not None:
        environment["PYTORCH_ALLOC_CONF"] = f"expandable_segments:{expandable}"
    command = [sys.executable, "-m", "bench.gpu_memory", "--measure", json.dumps([settings, cap])]
    left = deadline - time.monotonic()
    timeout = None if left == float("inf") else max(1.0, left)
    given: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    result = subprocess.run(command, timeout=timeout, env=environment, **given)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plan", action="store_true", help="only make the traces; needs no GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # third-party deprecations
    use_own_cache()
    if args.plan:
        for name in names():
            for plan in predict(name, find_card("H100 80GB")):
                print(f"{name}: {plan['predicted_gib']:.2f} GiB, {plan['predicted_ms']:.0f} ms", flush=True)
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu_memory: there is no NVIDIA GPU here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())  # the cap needs an index
    if args.measure is not None:
        print(json.dumps(measure(*args.measure, device)))
        return 0
    return 1 if run(time.monotonic() + args.seconds) else 0


if __name__ == "__main__":
    raise SystemExit(main())
