"""A trace as bytes: 20 kB instead of 8 MB, because a step repeats itself.

What grows with the step is stored as differences, so that a repeated block gives the same bytes again, which
LZMA finds.
"""

from __future__ import annotations

import io
import json
import lzma

import numpy as np

from mapo_fast.planner.trace import Mark, Trace
from mapo_fast.util.files import parse_json

_ARRAYS = ("kinds", "flops", "nbytes", "links", "live", "kept", "sizes", "events")
_GROWING = ("links", "live", "kept")


def pack(trace: Trace) -> bytes:
    """A trace as bytes, the same for the same trace."""
    fields = trace._asdict()
    arrays = {name: fields.pop(name) for name in _ARRAYS}
    arrays |= {name: np.diff(arrays[name], prepend=0) for name in _GROWING}
    arrays["events"] = _ages(arrays["events"])
    file = io.BytesIO()
    np.savez(file, rest=json.dumps(fields), **arrays)
    return lzma.compress(file.getvalue())


def unpack(data: bytes) -> Trace | None:
    """The trace; None for bytes that are no whole one.

    Everything is under checksums. What reads damaged bytes raises errors of many kinds.
    """
    try:
        with np.load(io.BytesIO(lzma.decompress(data))) as file:
            rest = parse_json(str(file["rest"]))
            arrays = {name: file[name] for name in _ARRAYS}
        arrays |= {name: np.cumsum(arrays[name], -1, dtype=np.int64) for name in _GROWING}
        arrays["events"] = _events(arrays["events"])
        marks = [Mark(*mark) for mark in rest.pop("marks")]
        return Trace(**arrays, marks=marks, **rest)
    except Exception:
        return None


def _ages(events: np.ndarray) -> np.ndarray:
    """Events with 0 where an allocation is made, and the age of the freed one in allocations elsewhere."""
    made = np.cumsum(events >= 0)
    return np.where(events >= 0, 0, made - ~events)


def _events(ages: np.ndarray) -> np.ndarray:
    """The inverse of `_ages`: allocations are numbered in the order in which they are made."""
    made = np.cumsum(ages == 0)
    return np.where(ages == 0, made - 1, ~(made - ages))
