"""Where a run and its cache go if no setting says: folders under `runs` in the current folder.

They are named after the model and the data, so that the same command finds them again.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUNS = Path("runs")
_LONGEST = 60


def default_places(table: Mapping[str, Any]) -> dict[str, str]:
    """`train.output` and `data.cache` where a table of settings leaves them out and names model and data.

    The output is `runs/MODEL-DATA`, and the cache `cache/MODEL-DATA` next to the output.
    """
    model, data, train = (_section(table, name) for name in ("model", "data", "train"))
    source = data.get("source", data.get("cache"))
    if not isinstance(model.get("path"), str) or not isinstance(source, str):
        return {}
    name = run_name(model["path"], source)
    places = {}
    if "output" not in train:
        places["train.output"] = str(RUNS / name)
    if "cache" not in data:
        output = train.get("output", str(RUNS / name))
        places["data.cache"] = str(Path(output).parent / "cache" / name) if isinstance(output, str) else name
    return places


def run_name(model: str | Path, data: str | Path) -> str:
    """`MODEL-DATA`, from the names of the model and the data."""
    return f"{_short_name(model)}-{_short_name(data)}"


def result_name(model: str | Path, data: str | Path, output: Path) -> str:
    """`MODEL-DATA-NUMBER`, the name of a run's result in programs.

    The number is that at the end of the output's name (`free_output`), or 1.
    """
    number = re.search(r"-(\d{1,6})$", output.name)
    return f"{run_name(model, data)}-{number[1] if number else 1}"


def free_output(output: Path) -> Path:
    """A folder like `output` that does not exist yet: `runs/MODEL-DATA-2`, say."""
    stem = re.sub(r"-\d{1,6}$", "", output.name)
    others = (output.with_name(f"{stem}-{number}") for number in itertools.count(2))
    return next(other for other in others if not os.path.lexists(other))


def _short_name(path: str | Path) -> str:
    """A file's or folder's own name, in letters, digits, dots, dashes and underscores."""
    own = Path(path).resolve()
    stem = own.stem if own.suffix.lower() in _SUFFIXES else own.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("._")[:_LONGEST] or "unnamed"


_SUFFIXES = (".safetensors", ".parquet", ".jsonl")


def _section(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = table.get(name)
    return part if isinstance(part, Mapping) else {}
