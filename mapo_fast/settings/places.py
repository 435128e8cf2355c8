"""Where a run and its cache go if no setting says: folders under `runs` in the current folder.

They are named after the model and the data, so that the same command finds them again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUNS = Path("runs")
_LONGEST = 60


def default_places(table: Mapping[str, Any]) -> dict[str, str]:
    """`train.output` and `data.cache` where a table of settings leaves them out and names model and data.

    The output is `runs/MODEL-DATA`, and the cache `cache/MODEL-DATA` beside the output.
    """
    model, data, train = (_section(table, name) for name in ("model", "data", "train"))
    source = data.get("source", data.get("cache"))
    if not isinstance(model.get("path"), str) or not isinstance(source, str):
        return {}
    name = f"{short_name(model['path'])}-{short_name(source)}"
    places = {}
    if "output" not in train:
        places["train.output"] = str(RUNS / name)
    if "cache" not in data:
        output = train.get("output", str(RUNS / name))
        places["data.cache"] = str(Path(output).parent / "cache" / name) if isinstance(output, str) else name
    return places


def short_name(path: str) -> str:
    """A file's or folder's own name, in letters, digits, dots, dashes and underscores."""
    own = Path(path).resolve()
    stem = own.stem if own.suffix.lower() in _SUFFIXES else own.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("._")[:_LONGEST] or "unnamed"


_SUFFIXES = (".safetensors", ".parquet", ".jsonl")


def _section(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = table.get(name)
    return part if isinstance(part, Mapping) else {}
