"""Shipped plans: every preset on every known card and size of memory, made by `planner/table.py`.

An answer is found under a digest of its question: settings, card with its rates, memory. The whole table is
used only if this code is the code that made it; comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mapo_kernels
from mapo_fast.hardware.cards import Card, usable_bytes, vram_for
from mapo_fast.hardware.host import Host, in_wsl
from mapo_fast.planner.plan import Loser, Plan, PlanResult
from mapo_fast.planner.relevant import planned_settings
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import parse_json

FILE = Path(__file__).with_name("plans.json")
_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "engine/*.py",
    "hardware/allocator.py",
    "loss.py",
    *(f"models/{name}.py" for name in ("fp8", "lora", "patch", "quantise", "vae")),
    *(f"planner/{name}.py" for name in ("costs", "family", "plan", "recorder", "replay")),
    *(f"planner/{name}.py" for name in ("search", "stages", "timeline", "trace", "windows")),
    "settings/rules.py",
)
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that change how much memory torch reserves."""


def find(config: Config, card: Card, vram: int, limits: Host) -> PlanResult | None:
    """The answer to a question, if it is in the table and the table is up to date.

    Windows and WSL have no expandable segments, so plans for them are computed.
    """
    if sys.platform != "linux" or in_wsl() or any(name in os.environ for name in _ALLOCATOR):
        return None
    table = read()
    row = table["answers"].get(key(config, card, vram, limits))
    if row is None or not is_fresh(table):
        return None

    def plan(number: int, ms: float) -> Plan:
        fields = table["plans"][number]
        return Plan(**{**fields, "ms": ms, "changes": tuple(fields["changes"])})

    return PlanResult(
        card,
        vram,
        usable_bytes(vram),
        limits,
        None if row["chosen"] is None else plan(*row["chosen"]),
        None,
        [Loser(plan(number, ms), reason) for number, ms, reason in row["others"]],
        row["stages"],
        row["how_to_prepare"],
        row["advice"],
        row["enough"],
    )


def read() -> dict[str, Any]:
    """The table; without one, or with a damaged one, an empty one."""
    try:
        return dict(parse_json(FILE.read_text(encoding="utf-8")))
    except (OSError, ValueError, UserError):
        return {"files": "", "code": "", "plans": [], "answers": {}}


def key(config: Config, card: Card, vram: int, limits: Host) -> str:
    """A digest of a question."""
    parts = [planned_settings(config), card, vram, limits, vram_for(0)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def is_fresh(table: dict[str, Any]) -> bool:
    """Whether the table was made by the code as it is now."""
    return bool(table["files"] == files() or table["code"] == code())


def files() -> str:
    """A digest of the files that plans and their traces are made by: read in a few milliseconds."""
    return _digest(lambda file: file.read_bytes())


def code() -> str:
    """A digest of the code in them, without comments and docstrings: parsed in a third of a second."""
    return _digest(_code)


def _digest(content: Callable[[Path], bytes]) -> str:
    found = [file for pattern in _SOURCES for file in _PACKAGE.glob(pattern)]
    found += Path(mapo_kernels.__path__[0]).rglob("*.py")
    named = {f"{file.parent.name}/{file.name}": file for file in found}
    digest = hashlib.sha256()
    for name, file in sorted(named.items()):
        digest.update(name.encode() + hashlib.sha256(content(file)).digest())
    return digest.hexdigest()


def _code(file: Path) -> bytes:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # docstrings, and the strings under names that describe them
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


def _is_text(line: Any) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
