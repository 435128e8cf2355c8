"""Plots of the microbenchmarks, from bench/results/ops.jsonl: `python -m bench.plot`.

Prints a table per GPU, writes docs/results/ops_GPU.png, and brings the tables in the docs up to date.
Without rows from a GPU there is no table and no plot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bench import readme
from bench.op_tables import LIBRARIES, Row, newest, rows, table

PLOTS = Path(__file__).parents[1] / "docs" / "results"


def plot(measured: Iterable[Row], folder: Path = PLOTS) -> list[Path]:
    """A bar chart per GPU: share of the copy bandwidth of each provider, by headline case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for gpu, cases in newest(measured).items():
        shown = {
            f"{op} {shape} {dtype}, {name}": by
            for (op, shape, dtype, name), by in cases.items()
            if "ours" in by and by["ours"]["headline"] and name != "both"
        }
        if not shown:
            continue
        providers = [
            name
            for name in ("ours", "compile", "eager", *LIBRARIES)
            if any(name in by for by in shown.values())
        ]
        figure, axes = pyplot.subplots(figsize=(10, 1 + 0.35 * len(shown)))
        height = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            shares = [100 * by[provider]["share_of_copy"] if provider in by else 0 for by in shown.values()]
            axes.barh([y + i * height for y in range(len(shown))], shares, height, label=provider)
        axes.set_yticks([y + 0.4 - height / 2 for y in range(len(shown))], list(shown), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"least bytes per second, % of a copy's, on one {gpu}")
        axes.set_title(
            f"Memory throughput of the kernels and of other libraries, measured on one {gpu}", fontsize=9
        )
        axes.legend(fontsize=7)
        figure.tight_layout()
        path = folder / f"ops_{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def main() -> None:
    measured = rows()
    print(table(measured, headlines=False))
    for path in plot(measured):
        print(path)
    readme.update()


if __name__ == "__main__":
    main()
