"""Tables of the microbenchmarks, from bench/results/ops.jsonl; without rows from a GPU there are none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"
LIBRARIES = ("liger", "peft", "bitsandbytes", "torchao")

Row = dict[str, Any]
Key = tuple[str, str, str, str]  # op, shape, dtype, pass


def rows(path: Path = RESULTS / "ops.jsonl") -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest(measured: Iterable[Row]) -> dict[str, dict[Key, dict[str, Row]]]:
    """The last row of each provider, by GPU and case."""
    found: dict[str, dict[Key, dict[str, Row]]] = {}
    for row in measured:
        if "device_ms" in row:
            key = row["op"], row["shape"], row["dtype"], row["pass"]
            found.setdefault(row["environment"]["gpu"], {}).setdefault(key, {})[row["provider"]] = row
    return found


def _milliseconds(row: Row | None) -> float:
    return float("nan") if row is None else float(row["device_ms"][1])


def _times(row: Row | None, ours: Row) -> str:
    return "" if row is None else f"{_milliseconds(row) / _milliseconds(ours):.2f} ×"


def table(measured: Iterable[Row], headlines: bool = True) -> str:
    """Markdown table: device time of our ops, and of the others in multiples of it."""
    parts = []
    for gpu, cases in newest(measured).items():
        lines = [
            f"{gpu}:",
            "",
            "| op | shape | pass | ms (p20, p80) | GB/s | of a copy's | eager | torch.compile | library |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for (op, shape, dtype, name), by in cases.items():
            ours = by.get("ours")
            if ours is None or (headlines and not ours["headline"]):
                continue
            low, middle, high = ours["device_ms"]
            library = ", ".join(f"{x} {_times(by[x], ours)}" for x in LIBRARIES if x in by)
            cells = [
                f"`{op}`",
                f"{shape} {dtype}",
                name,
                f"{middle:.4f} ({low:.4f}, {high:.4f})",
                f"{ours['gbps']:.0f}",
                f"{100 * ours['share_of_copy']:.0f} %",
                *(_times(by.get(provider), ours) for provider in ("eager", "compile")),
                library,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_MEASURED
