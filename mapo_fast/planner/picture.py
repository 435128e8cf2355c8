"""A picture of the chosen plan's memory over its step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mapo_fast.planner.plan import GRAPHS, PlanResult
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import CATEGORIES, ON_DEVICE
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB

PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Check the picture's path before the search, which takes long.

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
