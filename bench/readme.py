"""The README's tables, made from the results files: `python -m bench.readme` rewrites them in place.

Between `<!-- results: NAME -->` and `<!-- end -->` nothing is typed by hand; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def demo() -> str:
    """The newest row of each seed."""
    newest = {row["seed"]: row for row in _rows("demo")}
    lines = [
        "| seed | preferred share: before | SFT | **MaPO** "
        "| must not change: before | SFT | **MaPO** | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed, row in sorted(newest.items()):
        share, same = row["preferred_share"], row["unchanged_score"]
        lines.append(
            f"| {seed} | {share['before']:.2f} | {share['sft']:.2f} | **{share['mapo']:.2f}** "
            f"| {same['before']:.2f} | {same['sft']:.2f} | **{same['mapo']:.2f}** | {row['seconds']:.0f} |"
        )
    machine = next(iter(newest.values()))["environment"]
    lines += ["", f"(CPU: {machine['cpu']}, torch threads: {machine['threads']}.)"]
    return "\n".join(lines)


def memory() -> str:
    """Predicted peak memory of one pair."""
    lines = [
        "| train | precision | layout | weights | forward + backward peak | 8-bit states | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _rows("predicted_memory"):
        kind = "LoRA r16" if row["kind"] == "lora" else "full"
        lines.append(
            f"| {kind} | `{row['precision']}` | `{row['layout']}` | {row['parameters_gib']:.2f} "
            f"| {row['forward_backward_peak_gib']:.2f} | {row['optimizer_states_gib']:.2f} "
            f"| {row['peak_gib']:.2f} predicted |"
        )
    return "\n".join(lines)


def photographs() -> str:
    """Per kind of degradation, the newest row of each seed."""
    newest = {row["seed"]: row for row in _rows("photographs")}
    seeds = sorted(newest)
    lines = [
        "| degraded by | accuracy at the start | "
        + " | ".join(f"change, seed {seed}" for seed in seeds)
        + " |",
        "|---" * (2 + len(seeds)) + "|",
    ]
    for kinds in zip(*(newest[seed]["kinds"] for seed in seeds), strict=True):
        starts = " / ".join(f"{kind['start']:.2f}" for kind in kinds)
        changes = [f"{k['change']:+.2f} [{k['pairs_low']:+.2f}, {k['pairs_high']:+.2f}]" for k in kinds]
        lines.append(f"| {kinds[0]['kind'].replace('_', ' ')} | {starts} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def saved_memory() -> str:
    """What forward keeps for backward: the whole UNet, then blocks."""
    rows = _rows("saved_memory")
    lines = ["| | plain | patched | saved less |", "|---|---|---|---|"]
    unets = [row for row in rows if row["what"] == "unet"]
    for plain, patched in zip(unets[::2], unets[1::2], strict=True):
        before, after = plain["saved_gib"], patched["saved_gib"]
        lines.append(f"| {plain['name']} | {before:.2f} GiB | {after:.2f} GiB | {before - after:.2f} GiB |")
    lines += ["", "| one pair, one block | plain | plain, compiled | patched |", "|---|---|---|---|"]
    for row in rows:
        if row["what"] == "block":
            lines.append(
                f"| {row['name']}, {row['shape']} | {row['plain_mib']:.1f} MiB "
                f"| {row['plain_compiled_mib']:.1f} MiB | {row['patched_mib']:.1f} MiB |"
            )
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "photographs": photographs,
    "memory": memory,
    "saved_memory": saved_memory,
}


def render(text: str) -> str:
    """The README's text with every results section made anew."""
    for name, make in SECTIONS.items():
        begin = f"<!-- results: {name} -->\n"
        if text.count(begin) != 1:
            raise ValueError(f"README.md has {text.count(begin)} sections {begin.strip()}, expected 1")
        before, rest = text.split(begin)
        text = before + begin + make() + "\n" + rest[rest.index("<!-- end -->") :]
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
