"""Tables and targets of whole training steps, from the rows that `bench.train_step` left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bench.providers.engine import MapoFast
from bench.providers.switches import SWITCHES, Switch
from bench.providers.task import Task

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"
PLANNED = "as planned"
SWITCHED = {switch.provider for switch in SWITCHES}

Row = dict[str, Any]


def rows(name: str = "train_step") -> list[Row]:
    """All rows of a results file; none where there is no file."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest(measured: list[Row]) -> dict[tuple[str, str, int, str], Row]:
    """The last row of each (size, kind, pairs, provider) of the machine that was measured last.

    Rows of one machine and commit only: what is compared was measured together.
    """
    found = {}
    for row in measured:
        if "error" not in row and _origin(row) == _origin(measured[-1]):
            found[row["size"], row["kind"], row["pairs"], row["provider"]] = row
    return found


def _origin(row: Row) -> tuple[Any, ...]:
    return row["device"], row["environment"]["gpu"], row["environment"]["commit"]


def _on(device: str) -> dict[tuple[str, str, int, str], Row]:
    return newest([row for row in rows() if row["device"] == device])


def _times(row: Row, ours: Row) -> float:
    """Time of a row's steps, in multiples of the engine's plan.

    On the CPU of CPU time, round by round, which other work on the machine disturbs least.
    """
    return float(row["ms"] / ours["ms"] if row["device"] == "cuda" else row["cpu_ratio"])


def providers() -> str:
    """Table of all ways to train, compared with this engine."""
    lines = [
        "| | pairs in a step | ms per pair | engine is faster by | MFU | memory, GiB | idle |",
        "|---|---|---|---|---|---|---|",
    ]
    for device, machine in (("cuda", "SDXL, 1024²"), ("cpu", "tiny SDXL on one CPU core")):
        found = {key: row for key, row in _on(device).items() if key[3] not in SWITCHED}
        if not found:
            lines.append(f"| {machine}, all | | {NOT_MEASURED} | | | | |")
        for (size, kind, pairs, name), row in found.items():
            ours = found.get((size, kind, pairs, "mapo_fast"))
            faster = "" if ours is None else f"{_times(row, ours):.2f} ×"
            ms = row["ms_per_pair"] if device == "cuda" else row["cpu_ms"] / pairs
            mfu, memory, idle = "", "", ""
            if device == "cuda":
                mfu, memory = f"{row['mfu']:.0%}", f"{row['peak_gib']:.1f}"
                idle = f"{row['idle']:.1%}"
            lines.append(
                f"| {machine}, {kind}: {name} | {pairs} | {ms:.1f} | {faster} | {mfu} | {memory} | {idle} |"
            )
    return "\n".join(lines)


def switches() -> str:
    """The engine with each speed setting flipped, at one pair; a LoRA's at four."""
    lines = ["| against the plan | SDXL, 1024² | tiny SDXL on one CPU core |", "|---|---|---|"]
    found = {device: _on(device) for device in ("cuda", "cpu")}
    for switch in SWITCHES:
        cells = [_switch_cell(switch, device, rows) for device, rows in found.items()]
        if any(cell != PLANNED for cell in cells):
            lines.append(f"| {switch.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _switch_cell(switch: Switch, device: str, found: dict[tuple[str, str, int, str], Row]) -> str:
    """A row's time in multiples of the plan's, or why there is none."""
    for (size, kind, pairs, name), row in found.items():
        plan = found.get((size, kind, pairs, MapoFast.name))
        if name == switch.provider and plan is not None:
            return f"time × {_times(row, plan):.2f}"
    size: Literal["sdxl", "tiny"] = "sdxl" if device == "cuda" else "tiny"
    kind: Literal["full", "lora"] = "full" if "full" in switch.kinds else "lora"
    if switch.planned(Task(size, kind, 1, False, torch.device(device))) == switch.changes:
        return PLANNED
    return "" if switch.gpu and device == "cpu" else NOT_MEASURED


class Target(NamedTuple):
    """A target: a figure, its limit, and how to read the figure from rows."""

    measure: str
    target: str
    limit: float
    least: bool
    """Whether the limit is a lower one; otherwise it is an upper one."""
    form: str
    value: Callable[[dict[tuple[str, str, int, str], Row]], float | None]


def _ratio(kind: str, pairs: int, other: str) -> Callable[..., float | None]:
    """Speed of the engine, in multiples of `other`."""

    def value(found: dict[tuple[str, str, int, str], Row]) -> float | None:
        ours, theirs = (found.get(("sdxl", kind, pairs, name)) for name in ("mapo_fast", other))
        return None if ours is None or theirs is None else theirs["ms"] / ours["ms"]

    return value


def _saved(kind: str) -> Callable[..., float | None]:
    """Share of Diffusion-DPO's time that MaPO saves."""

    def value(found: dict[tuple[str, str, int, str], Row]) -> float | None:
        times = _ratio(kind, 4, f"dpo_{kind}")(found)
        return None if times is None else 1 - 1 / times

    return value


def _field(name: str, pairs: int) -> Callable[..., float | None]:
    def value(found: dict[tuple[str, str, int, str], Row]) -> float | None:
        row = found.get(("sdxl", "full", pairs, "mapo_fast"))
        return None if row is None else row[name]

    return value


def _overhead(found: dict[tuple[str, str, int, str], Row]) -> float | None:
    """The bare loop's CPU time over the engine's, from the newest run of `bench.overhead`."""
    measured = rows("overhead")
    return measured[-1]["ratio"] if measured else None


TARGETS = tuple(
    Target(measure, f"{'≥' if least else '≤'} {shown}", limit, least, form, value)
    for measure, shown, limit, least, form, value in (
        ("full, 4 pairs: against the released recipe", "3 ×", 3, True, ".2f", _ratio("full", 4, "released")),
        ("LoRA, 4 pairs: against the released recipe", "3 ×", 3, True, ".2f", _ratio("lora", 4, "released")),
        ("full, 4 pairs: against diffusers", "1.3 ×", 1.3, True, ".2f", _ratio("full", 4, "diffusers")),
        ("full, 4 pairs: MFU", "55 %", 0.55, True, ".1%", _field("mfu", 4)),
        ("full, 1 pair: MFU", "45 %", 0.45, True, ".1%", _field("mfu", 1)),
        ("full, 4 pairs: time less than Diffusion-DPO's", "22 %", 0.22, True, ".1%", _saved("full")),
        ("LoRA, 4 pairs: time less than Diffusion-DPO's", "28 %", 0.28, True, ".1%", _saved("lora")),
        ("full, 4 pairs: optimizer's share of the step", "4 %", 0.04, False, ".1%", _field("update", 4)),
        (
            "full, 4 pairs: optimizer against its byte floor",
            "1.25 ×",
            1.25,
            False,
            ".2f",
            _field("update_times_floor", 4),
        ),
        ("full, 4 pairs: idle between kernels", "3 %", 0.03, False, ".1%", _field("idle", 4)),
        ("tiny SDXL on one CPU core: against a bare loop", "0.95 ×", 0.95, True, ".3f", _overhead),
    )
)


def targets() -> str:
    """Table of the targets, and whether each is met."""
    found = _on("cuda")
    lines = [_line(target, target.value(found)) for target in TARGETS]
    return "\n".join(["| measure | target | measured | |", "|---|---|---|---|", *lines])


def _line(target: Target, value: float | None) -> str:
    if value is None:
        return f"| {target.measure} | {target.target} | {NOT_MEASURED} | |"
    met = value >= target.limit if target.least else value <= target.limit
    return f"| {target.measure} | {target.target} | {value:{target.form}} | {'met' if met else 'MISSED'} |"


def dataset() -> str:
    """Table of the cost of starting, over the number of pairs on disk."""
    found = {row["value"]: row for row in rows("scaling") if row["axis"] == "dataset" and "error" not in row}
    lines = ["| pairs in the cache | to the first batch, s | memory, MiB |", "|---|---|---|"]
    for value, row in sorted(found.items()):
        lines.append(f"| {value:,} | {row['seconds']:.2f} | {row['grown_mib']:.0f} |")
    return "\n".join(lines) if found else NOT_MEASURED


if __name__ == "__main__":
    print(providers(), switches(), targets(), sep="\n\n")
