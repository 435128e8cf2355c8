"""What the planner found, for people, for programs, and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mapo_fast.hardware.cards import CONTEXT_GIB, WORKSPACE_GIB
from mapo_fast.planner.plan import GRAPHS, Plan
from mapo_fast.planner.search import PlanResult
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import CATEGORIES, ON_DEVICE
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, size_text

RUNNERS_UP = 6
PICTURES = (".png", ".svg", ".pdf")


def as_text(outcome: PlanResult) -> str:
    """The plan, where its memory goes, and why others lost; all figures are predictions."""
    card, usable = outcome.card, max(0, outcome.usable) / GIB
    lines = [
        f"{outcome.vram / GIB:.2f} GiB: {usable:.2f} GiB for a plan beside CUDA context and workspaces; "
        f"rates {card.rates.source}"
    ]
    if outcome.chosen is None:
        lines += ["nothing fits", outcome.advice]
        lines += [f"--vram {size_text(outcome.enough)} would do"] if outcome.enough else []
    else:
        plan = outcome.chosen
        lines += [
            "",
            f"{plan.name}",
            f"  {plan.peak / GIB:.2f} GiB on the card, {plan.reserved / GIB:.2f} reserved; {plan.time} "
            "(predicted)",
            f"  {plan.pinned / GIB:.1f} GiB of system RAM pinned, {plan.host / GIB:.1f} GiB used at most",
            "",
            *_settings(plan),
            "",
            *(f"  {name:<14}{size / GIB:7.2f} GiB" for name, size in plan.device.items()),
            f"  {'allocator':<14}{(plan.reserved - plan.peak) / GIB:7.2f} GiB",
            f"  {'CUDA context':<14}{CONTEXT_GIB:7.2f} GiB",
            f"  {'workspaces':<14}{WORKSPACE_GIB:7.2f} GiB",
            "",
            "other stages, beside CUDA context and workspaces:",
            *(f"  {name:<14}{size / GIB:7.2f} GiB" for name, size in outcome.stages.items()),
            *([f"  {outcome.how_to_prepare}"] if outcome.how_to_prepare else []),
        ]
        if plan.settings.get("train.fused_step"):
            lines.append("\nwith the fused step optim.max_grad_norm clips by the norm of the step before")
    if outcome.others:
        lines += ["", "not chosen:"]
        lines += [
            f"  {loser.plan.peak / GIB:6.2f} GiB {loser.plan.ms:7.0f} ms  {loser.plan.name}: {loser.reason}"
            for loser in outcome.others[:RUNNERS_UP]
        ]
    return "\n".join(lines)


def _settings(plan: Plan) -> list[str]:
    lines = []
    for name, value in plan.settings.items():
        text = json.dumps(value)
        lines.append(f"  {name} = {text}")
    return lines


def as_json(outcome: PlanResult) -> str:
    """One object; sizes in bytes, times in ms."""
    return json.dumps(
        {
            "card": outcome.card.name,
            "rates": outcome.card.rates._asdict(),
            "vram": outcome.vram,
            "usable": outcome.usable,
            "ram": outcome.host.ram,
            "pinnable": outcome.host.pinnable,
            "kind_of_figure": "predicted",
            "stages": outcome.stages,
            "how_to_prepare": outcome.how_to_prepare,
            "plan": None if outcome.chosen is None else _row(outcome.chosen),
            "others": [_row(loser.plan) | {"reason": loser.reason} for loser in outcome.others],
            "advice": outcome.advice,
            "enough": outcome.enough,
        },
        indent=1,
    )


def _row(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "settings": plan.settings,
        "peak": plan.peak,
        "reserved": plan.reserved,
        "device": plan.device,
        "pinned": plan.pinned,
        "host": plan.host,
        "ms": round(plan.ms, 1),
        "accumulation": plan.accumulation,
        "traced": plan.traced,
    }


def check_picture(path: Path) -> None:
    """Before the search, which takes longer.

    Raises:
        UserError: no picture can be written there.
    """
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--plot {path}: the name must end in {', '.join(PICTURES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: the folder does not exist")


def plot(outcome: PlanResult, path: Path) -> None:
    """Draw the chosen plan's memory over its step.

    Raises:
        ValueError: there is no plan.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if outcome.trace is None or outcome.chosen is None:
        raise ValueError("there is no plan to draw")
    trace = outcome.trace
    ends = np.maximum.accumulate(simulate(trace, outcome.card).ends) * 1e3
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    live, labels = list(trace.live[ON_DEVICE]), [*CATEGORIES[ON_DEVICE]]
    if GRAPHS in outcome.chosen.device:
        live.append(np.full(len(ends), outcome.chosen.device[GRAPHS]))
        labels.append(GRAPHS)
    axes.stackplot(ends, np.array(live) / GIB, labels=labels, step="post")
    axes.axhline(outcome.usable / GIB, color="black", linewidth=1, linestyle="--", label="usable")
    what = "ms"
    if trace.accumulation > trace.micro_batches:
        what += f" of {trace.micro_batches} of {trace.accumulation} micro-batches"
    axes.set(xlabel=f"{what}, rates of {outcome.card.name} (predicted)", ylabel="GiB", xlim=(0, ends[-1]))
    axes.legend(loc="upper left", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
