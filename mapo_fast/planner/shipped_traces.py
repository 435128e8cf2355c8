"""Shipped traces: those that the table of plans was made from, by `planner/table.py`.

Other questions about a preset, such as another size of memory or another system, need no trace of their own
then. They are used only if this code is the code that made them, as the plans are (`shipped`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapo_fast.planner import shipped
from mapo_fast.planner.relevant import traced_settings
from mapo_fast.planner.trace import Trace
from mapo_fast.planner.trace_file import pack, unpack
from mapo_fast.settings.schema import Config
from mapo_fast.util.files import atomic_path

FILE = Path(__file__).with_name("traces.zip")


def name(config: Config, unet_config: Mapping[str, Any], kernels: bool) -> str:
    """A trace's name: a digest of its question."""
    parts = [kernels, traced_settings(config), sorted(unet_config.items(), key=str)]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:20]


def find(trace: str) -> Trace | None:
    """The trace of this name, if it is there and this code made it."""
    data = _read(trace)
    return None if data is None or not _fresh() else unpack(data)


def _packed(trace: Trace) -> bytes:
    """A trace for any number of micro-batches."""
    return pack(trace._replace(accumulation=trace.micro_batches))


def _read(trace: str) -> bytes | None:
    try:
        with zipfile.ZipFile(FILE) as file:
            return file.read(trace)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None


@functools.cache
def _fresh() -> bool:
    return shipped.is_fresh(shipped.read())


def write(traces: Mapping[str, Trace], *, keep: bool) -> None:
    """Write the traces, in the same bytes for the same traces.

    Args:
        keep: those of the present file too.
    """
    packed: dict[str, bytes] = {}
    if keep and FILE.exists():
        with zipfile.ZipFile(FILE) as old:
            packed = {entry: old.read(entry) for entry in old.namelist()}
    packed |= {entry: _packed(trace) for entry, trace in traces.items()}
    with atomic_path(FILE) as path, zipfile.ZipFile(path, "w") as file:
        for entry, data in sorted(packed.items()):
            file.writestr(zipfile.ZipInfo(entry), data)
