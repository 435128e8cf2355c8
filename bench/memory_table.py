"""Ten plans for training SDXL on one pair at 1024², each predicted by a full trace, with its target.

    python -m bench.memory_table            prints the table
    python -m bench.memory_table --json     the same as JSON rows
    python -m bench.memory_table --row NAME only the row of this name
    python -m bench.memory_table --write    replaces bench/results/memory_table.jsonl

A row is one training step of the trainer's own engine under the row's settings: bf16 weights, AdamW8bit. The
peak counts weights, gradients, optimizer states, activations and staging buffers. What torch's allocator
reserves for them comes from a replay by its rules, with the workspaces of cuBLAS: with expandable segments,
which a run switches on, and without. The CUDA context and the workspaces of cuDNN come on top.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.environment import environment
from mapo_fast.hardware.allocator import EXPANDABLE, Rules
from mapo_fast.hardware.names import find_card
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.planner.replay import Allocator, cublas_workspace, reserved
from mapo_fast.planner.store import traces
from mapo_fast.planner.timeline import simulate
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config

RESULTS = Path(__file__).parent / "results" / "memory_table.jsonl"
GIB = 2**30

_SPLIT = {"train.layout": "split"}
_FULL = _SPLIT | {"adapter.kind": "full", "train.fused_step": True}
_LORA = {"adapter.kind": "lora", "adapter.rank": 16}
_STATES_AWAY = {"offload.optimizer": "cpu"}
_ALL_AWAY = _STATES_AWAY | {"offload.weights": "cpu"}
_INPUTS_AWAY = {"offload.activations": "cpu"}
_NOT_RECOMPUTED = {"train.layout": "joint", "train.gradient_checkpointing": False}
_HALVES = {"train.layout": "sequential"}
_SEQUENTIAL = _HALVES | {"train.gradient_checkpointing": False}

ROWS: tuple[tuple[str, float, str, dict[str, Any]], ...] = (
    ("full, no matrix product recomputed", 17.5, "RTX 3090", _FULL | _NOT_RECOMPUTED),
    ("full, checkpointed", 10.8, "RTX 3060 12GB", _FULL),
    ("full, checkpoints offloaded", 10.3, "RTX 3060 12GB", _FULL | _INPUTS_AWAY),
    ("full, states offloaded", 6.4, "RTX 4060", _FULL | _STATES_AWAY),
    (
        "full, states and checkpoints offloaded",
        5.8,
        "RTX 4060",
        _FULL | _INPUTS_AWAY | {"offload.optimizer": "cpu"},
    ),
    ("full, states and weights streamed", 1.8, "RTX 3050 4GB", _FULL | _ALL_AWAY),
    ("full, everything streamed", 1.2, "RTX 3050 4GB", _FULL | _ALL_AWAY | _INPUTS_AWAY),
    ("LoRA, bf16 base, sequential", 8.7, "RTX 3080 10GB", _LORA | _SEQUENTIAL),
    ("LoRA, int8 base, sequential", 6.8, "RTX 4060", _LORA | _SEQUENTIAL | {"adapter.base": "int8"}),
    (
        "LoRA, nf4 base, checkpointed",
        2.3,
        "RTX 3050 4GB",
        _LORA | _HALVES | {"adapter.base": "nf4"},
    ),
)
"""Name, target in GiB, card of the time estimate, settings; two of eight lines have two targets."""


def config_of(settings: dict[str, Any]) -> Config:
    """The settings of a row as a config."""
    table: dict[str, Any] = {
        "model": {"path": "sdxl"},
        "data": {"cache": "cache"},
        "train": {"output": "run", "precision": "pure_bf16"},
        "optim": {"name": "adamw8bit"},
    }
    for name, value in settings.items():
        section, key = name.split(".")
        table.setdefault(section, {})[key] = value
    return parse_config(table)


def row(number: int) -> dict[str, Any]:
    """Trace one row."""
    warnings.simplefilter("ignore")  # third-party deprecations
    logging.disable(logging.WARNING)
    name, target, card_name, settings = ROWS[number]
    card = find_card(card_name)
    (trace,) = traces([config_of(settings)], SDXL_UNET)
    workspace = cublas_workspace(card.capability)
    expandable, default = (
        reserved(trace, Allocator(rules, workspace)) / GIB for rules in (EXPANDABLE, Rules())
    )
    return {
        "name": name,
        "peak_gib": round(trace.peak / GIB, 2),
        "target_gib": target,
        "reserved_gib": round(expandable, 2),
        "reserved_by_default_gib": round(default, 2),
        "plan": settings,
        "ms_estimate": round(simulate(trace, card).step),
        "card": card_name,
        "at_peak_gib": {part: round(nbytes / GIB, 2) for part, nbytes in trace.at_peak().items()},
        "kind_of_figure": "predicted",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rows")
    parser.add_argument("--row", choices=[name for name, *_ in ROWS], help="only this one")
    parser.add_argument("--write", action="store_true", help="replace the results file")
    arguments = parser.parse_args()
    numbers = [i for i, (name, *_) in enumerate(ROWS) if arguments.row in (None, name)]
    found = []
    with ProcessPoolExecutor(min(2, len(numbers)), mp_context=get_context("spawn")) as pool:
        for one in pool.map(row, numbers):
            found.append(one)
            reached = "" if one["peak_gib"] <= one["target_gib"] else "   MISSED"
            text = (
                f"{one['peak_gib']:6.2f} GiB of {one['target_gib']:4.1f}, {one['reserved_gib']:5.2f} held "
                f"({one['reserved_by_default_gib']:5.2f} by default)  {one['ms_estimate']:6d} ms "
                f"on {one['card']:14} {one['name']}{reached}"
            )
            print(json.dumps(one) if arguments.json else text, flush=True)
    if arguments.write:
        stamp = environment()
        lines = [json.dumps({**one, "environment": stamp}) for one in found]
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
