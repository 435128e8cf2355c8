"""The planner's result as text and as JSON."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from mapo_fast.hardware.cards import vram_for
from mapo_fast.hardware.holders import Gpu, held_text
from mapo_fast.planner.plan import GRAPHS, Loser, Plan, PlanResult, in_words, seconds_text
from mapo_fast.settings.schema import Config
from mapo_fast.util.sizes import GIB, size_text

RUNNERS_UP = 6
_CATEGORIES = {
    "parameters": "weights",
    "gradients": "gradients",
    "states": "optimizer states",
    "saved": "activations for the backward pass",
    "transient": "working memory",
    "staging": "buffers for copies",
    GRAPHS: "CUDA graphs",
}
_STAGES = {"prepare": "preparing the images", "previews": "previews"}
_WIDTH = 36


class Run(NamedTuple):
    """The run that a plan is for."""

    steps: int
    images: str
    """The size of a step, such as "4 pairs"."""
    command: str
    """Command that starts the run."""
    preset: str | None = None


def run_of(config: Config, command: str, preset: str | None = None) -> Run:
    """The run of a config."""
    number = config.train.pairs_per_batch * config.train.accumulation
    if config.objective.known.samples == "single":
        images = f"{2 * number} images"
    else:
        images = f"{number} pair{'s' if number > 1 else ''}"
    return Run(config.train.steps, images, command, preset)


def sentence(plan: Plan, vram: int, run: Run, card: str) -> str:
    """Memory, and the time of a step and of all steps, in one line."""
    step = plan.ms / 1e3
    needed = vram_for(plan.reserved) / GIB
    return (
        f"fits: {needed:.1f} of {vram / GIB:.3g} GiB; about {_a_step(plan)} a step of {run.images}, "
        f"{run.steps:,} steps in {seconds_text(step * run.steps)}; predicted for {card}"
    )


def as_text(outcome: PlanResult, run: Run) -> str:
    """The answer in one sentence and the command; then the use of memory, and why other plans lost."""
    if outcome.chosen is None:
        lines = [_does_not_fit(outcome), outcome.advice]
        lines += [f"--vram {size_text(outcome.enough)} would do"] if outcome.enough else []
    else:
        lines = [
            sentence(outcome.chosen, outcome.vram, run, outcome.card.name),
            *([outcome.how_to_prepare] if outcome.how_to_prepare else []),
            "",
            f"  {run.command}",
            "",
            *_how(outcome.chosen),
            "",
            *_memory(outcome, outcome.chosen),
            "",
            *_assumed(outcome),
        ]
    if outcome.others:
        lines += ["", "not chosen:", *map(_loser, outcome.others[:RUNNERS_UP])]
    return "\n".join(lines)


def _loser(loser: Loser) -> str:
    plan = loser.plan
    memory = vram_for(plan.reserved) / GIB
    return f"  {memory:6.2f} GiB  {_a_step(plan):>6} a step  {plan.name}: {loser.reason}"


def _a_step(plan: Plan) -> str:
    """A step's time: in seconds up to ten minutes, since a run has thousands of steps."""
    seconds = plan.ms / 1e3
    return f"{seconds:.0f} s" if 59.5 <= seconds < 600 else seconds_text(seconds)


def held_note(outcome: PlanResult, gpu: Gpu) -> str:
    """Which programs hold memory that the plan needs, and what to do; empty where enough is free."""
    plan, held = outcome.chosen, held_text(gpu)
    if plan is None or not held or vram_for(plan.reserved) <= gpu.free:
        return ""
    free = f"{int(10 * gpu.free / GIB) / 10:.1f}"
    return (
        f"{held}: close it, or see which slower plan fits next to it with "
        f'mapo-fast plan --card "{outcome.card.name}" --vram {free}'
    )


def _does_not_fit(outcome: PlanResult) -> str:
    left = max(0, outcome.usable) / GIB
    return (
        f"does not fit: of {outcome.vram / GIB:.3g} GiB, {left:.2f} are left for training after CUDA and "
        f"its libraries ({vram_for(0) / GIB:.2f})"
    )


def _how(plan: Plan) -> list[str]:
    """The planned settings, each with what it does."""
    rows = [(in_words(name, value), f"{name} = {json.dumps(value)}") for name, value in plan.settings.items()]
    lines = [f"  {words:<{_WIDTH + 4}}  {setting}" for words, setting in rows]
    if plan.changes:
        lines.append(f"  no plan fits that changes no result: this one has {', '.join(plan.changes)}")
    if plan.settings.get("train.fused_step"):
        lines.append("  gradients are clipped by the norm of the step before (optim.max_grad_norm)")
    return [f"how: {plan.name}", *lines]


def _memory(outcome: PlanResult, plan: Plan) -> list[str]:
    rows = {_CATEGORIES.get(name, name): size for name, size in plan.device.items()}
    rows["unused parts of allocated blocks"] = plan.reserved - plan.peak
    rows["CUDA and its libraries"] = vram_for(0)
    rows["together"] = vram_for(plan.reserved)
    beside = {_STAGES[name]: size + vram_for(0) for name, size in outcome.stages.items()}
    return [
        "memory on the card:",
        *(f"  {name:<{_WIDTH}}{size / GIB:6.2f} GiB" for name, size in rows.items()),
        "before and between the steps:",
        *(f"  {name:<{_WIDTH}}{size / GIB:6.2f} GiB" for name, size in beside.items()),
        "system RAM:",
        f"  {'at most':<{_WIDTH}}{plan.host / GIB:6.2f} GiB",
        f"  {'of it pinned':<{_WIDTH}}{plan.pinned / GIB:6.2f} GiB",
    ]


def _assumed(outcome: PlanResult) -> list[str]:
    memory, ram = outcome.vram / GIB, outcome.host.ram / GIB
    return [
        f"assumed: {memory:.3g} GiB of GPU memory and {ram:.3g} GiB of system RAM are free (--vram, --ram)",
        f"rates {outcome.card.rates.source}",
        "the time is that of the steps: preparing the images, previews and evaluations come on top",
    ]


def as_json(outcome: PlanResult, run: Run) -> str:
    """The result as one JSON object; sizes in bytes, times in ms, the whole run's in s."""
    plan = outcome.chosen
    return json.dumps(
        {
            "fits": plan is not None,
            "sentence": _does_not_fit(outcome)
            if plan is None
            else sentence(plan, outcome.vram, run, outcome.card.name),
            "command": run.command,
            "preset": run.preset,
            "steps": run.steps,
            "seconds": None if plan is None else round(plan.ms / 1e3 * run.steps),
            "needed": outcome.enough if plan is None else vram_for(plan.reserved),
            "card": outcome.card.name,
            "rates": outcome.card.rates._asdict(),
            "vram": outcome.vram,
            "usable": outcome.usable,
            "ram": outcome.host.ram,
            "pinnable": outcome.host.pinnable,
            "kind_of_figure": "predicted",
            "stages": outcome.stages,
            "how_to_prepare": outcome.how_to_prepare,
            "plan": None if plan is None else _row(plan),
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
