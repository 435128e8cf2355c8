"""Makes the shipped plans and traces: `python -m mapo_fast.planner.table [PRESET ...]`.

Every preset is planned for every size of memory and for every card that it can train on, with 32 GiB of free
system RAM, under Linux. Traces and replays are made once for all cards. Where code has changed and no answer
has, which one row of each preset shows, the table keeps its rows. Presets that are named are made again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from importlib import metadata
from typing import Any

from mapo_fast.hardware.cards import CARDS, Card
from mapo_fast.hardware.host import host
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.planner import shipped, shipped_traces
from mapo_fast.planner.answer import RAM, card_and_memory
from mapo_fast.planner.plan import Plan, PlanResult
from mapo_fast.planner.question import question
from mapo_fast.planner.report import RUNNERS_UP
from mapo_fast.planner.search import search
from mapo_fast.planner.store import Tracing
from mapo_fast.settings.presets import PRESETS
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path
from mapo_fast.util.sizes import parse_size

SIZES = (6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80)
"""Sizes of GPU memory in GiB that are planned for without a card."""


def questions(preset: str) -> Iterator[tuple[Config, Card, int]]:
    """All questions about a preset that the table answers."""
    config, _ = question(None, preset, [], None)
    for size in SIZES:
        yield (config, *card_and_memory(config, None, f"{size}GiB"))
    for card in CARDS:
        try:
            yield (config, *card_and_memory(config, card.name, None))
        except UserError:  # it cannot do bf16
            continue


def answers(preset: str, tracing: Tracing) -> Iterator[tuple[str, PlanResult]]:
    """The answers to these questions, under their keys."""
    limits = host(parse_size(RAM, "ram"))
    for config, card, vram in questions(preset):
        yield (
            shipped.key(config, card, vram, limits),
            search(config, SDXL_UNET, card, vram, limits, tracing=tracing),
        )


def holds(table: dict[str, Any], asked: Iterable[tuple[str, int]]) -> bool:
    """Whether the table has what is answered now to some questions: presets, each with GiB of memory."""
    with closing(Tracing(keep=True, shipped=False)) as tracing:
        return all(_holds(table, preset, gib, tracing) for preset, gib in asked)


def _holds(table: dict[str, Any], preset: str, gib: int, tracing: Tracing) -> bool:
    limits = host(parse_size(RAM, "ram"))
    config, _ = question(None, preset, [], None)
    card, vram = card_and_memory(config, None, f"{gib}GiB")
    made = row(search(config, SDXL_UNET, card, vram, limits, tracing=tracing), list(table["plans"]))
    known = table["answers"].get(shipped.key(config, card, vram, limits), {})
    return made == {name: known.get(name) for name in made}


def row(outcome: PlanResult, plans: list[dict[str, Any]]) -> dict[str, Any]:
    """An answer in the table's form; new plans are appended to `plans`."""

    def entry(plan: Plan) -> list[Any]:
        fields = json.loads(json.dumps(plan._asdict()))  # as they are read again
        ms = float(f"{fields.pop('ms'):.5g}")
        if fields not in plans:
            plans.append(fields)
        return [plans.index(fields), ms]

    return {
        "chosen": None if outcome.chosen is None else entry(outcome.chosen),
        "others": [[*entry(loser.plan), loser.reason] for loser in outcome.others[:RUNNERS_UP]],
        "stages": outcome.stages,
        "how_to_prepare": outcome.how_to_prepare,
        "advice": outcome.advice,
        "enough": outcome.enough,
    }


def write(table: dict[str, Any]) -> None:
    """The table as text, one plan or answer a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in ("files", "code", "made_with")]
    plans = ",\n".join(json.dumps(plan) for plan in table["plans"])
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in table["answers"].items())
    lines += [f'"plans": [\n{plans}\n]', f'"answers": {{\n{rows}\n}}']
    with atomic_path(shipped.FILE) as file:
        file.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def main(presets: list[str]) -> None:
    """Make the rows of these presets, or of all, and print progress."""
    packages = {name: metadata.version(name).split("+")[0] for name in ("torch", "diffusers", "peft")}
    made_by = {"files": shipped.files(), "code": shipped.code(), "made_with": packages}
    table = shipped.read() | made_by
    if not presets and table["answers"] and holds(table, [(preset, 24) for preset in PRESETS]):
        write(table)
        print("no answer has changed: the rows are kept")
        return
    if not presets:
        table |= {"plans": [], "answers": {}}
    with closing(Tracing(keep=True, shipped=False)) as tracing:
        for preset in presets or PRESETS:
            for key, outcome in answers(preset, tracing):
                made = row(outcome, table["plans"])
                table["answers"][key] = {"asked": [preset, outcome.card.name]} | made
            write(table)
            shipped_traces.write(tracing.kept, keep=bool(presets))
            cpu = sum(os.times()[:4])
            print(f"{preset}: {len(table['answers'])} answers so far, {cpu / 60:.1f} min of CPU", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
