"""A plan's memory and time, composed from pieces of other plans' traces.

A trace is cut where blocks begin in forward and where their backward ends. A piece holds one block's
forward or backward pass and what lies around it. For each piece three numbers matter: what is live when it
begins, at most, and when it ends. What a block saves in forward it frees in backward, whether it is
checkpointed or not, and its input is saved either way. So any choice of checkpointed blocks is a walk
through the pieces, each taken from a trace with the block in the chosen mode: live bytes add up piece by
piece, and the peak is the highest point.

Composing is right within a few MiB (tested against full traces); what a plan finally promises is a full
trace's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mapo_fast.hardware.cards import Card
from mapo_fast.planner.costs import FETCH, STORE, WAIT
from mapo_fast.planner.timeline import durations
from mapo_fast.planner.trace import Trace


class Piece(NamedTuple):
    """One part of a step."""

    block: str
    """The block it belongs to, "" for none."""
    rise: int
    """Most live bytes, less those at its beginning."""
    net: int
    """Live bytes at its end, less those at its beginning."""
    seconds: float
    """Seconds of all micro-batches that the window represents."""


class Mode(NamedTuple):
    """A trace cut into pieces, for one card and one way to treat gradients."""

    pieces: dict[tuple[str, int], Piece]  # by the name of the border it begins or ends at, and its occurrence
    first: int
    """Live bytes at the beginning, without what is constant: parameters, states, lasting buffers."""


def cut(trace: Trace, card: Card, *, keep_gradients: bool) -> Mode:
    """Cut a trace at its marks.

    Args:
        keep_gradients: let gradients of a fused step live until its end, as without fusing.
    """
    gradients = trace.kept if keep_gradients else trace.row("gradients")
    staging = trace.row("staging")
    moving = gradients + trace.row("saved") + trace.row("transient") + staging - staging.min()
    seconds = durations(trace, card.rates)
    copies = (trace.kinds == FETCH) | (trace.kinds == STORE) | (trace.kinds == WAIT)
    seconds[copies] = 0.0
    busy = np.concatenate([[0.0], seconds.cumsum()])
    borders = _borders(trace)
    level = np.append(moving, moving[-1])
    micro = trace.last_micro_batch
    alike = trace.accumulation - trace.micro_batches + 1
    pieces: dict[tuple[str, int], Piece] = {}
    seen: dict[str, int] = {}
    for (start, end), name in borders:
        key = name, seen.setdefault(name, 0)
        seen[name] += 1
        highest = int(moving[start:end].max()) if end > start else int(level[start])
        time = max(float(busy[end] - busy[start]), (end - start) * card.rates.host)
        time *= alike if micro.start <= start < micro.stop else 1
        block = name.split(" ")[1] if " " in name else ""
        entry = int(level[start])
        pieces[key] = Piece(block, highest - entry, int(level[end]) - entry, time)
    return Mode(pieces, int(level[0]))


def _borders(trace: Trace) -> list[tuple[tuple[int, int], str]]:
    """Ranges of operations and their names; the halves of `split` together make one range."""
    ranges: list[tuple[tuple[int, int], str]] = []
    begin, name = 0, "begin"

    def close(end: int, called: str) -> None:
        if ranges and ranges[-1][1] == called:
            (start, _), _ = ranges.pop()
            ranges.append(((start, end), called))
        else:
            ranges.append(((begin, end), called))

    for operation, mark in trace.marks:
        backward = mark.startswith("backward ")
        close(operation, mark if backward else name)
        begin, name = operation, "after backward" if backward else mark
    if begin < len(trace.kinds):
        close(len(trace.kinds), name)
    return ranges


class Composed(NamedTuple):
    """Figures of a step with a choice of modes."""

    peak: int
    """Peak of the live bytes that change during the step."""
    forward: float
    backward: float
    """Seconds of computing."""


def compose(modes: Mapping[str, Mode], chosen: Mapping[str, str], default: str) -> Composed:
    """Walk through a step.

    Args:
        modes: by name.
        chosen: block → mode.
        default: the mode of what belongs to no block, and of blocks not in `chosen`.
    """
    live = peak = modes[default].first
    seconds = {True: 0.0, False: 0.0}
    backward = False
    for key, piece in modes[default].pieces.items():
        part = modes[chosen.get(piece.block, default)].pieces.get(key, piece)
        peak = max(peak, live + part.rise)
        live += part.net
        if key[0] in ("loss", "differentiated"):
            backward = key[0] == "loss"
        seconds[backward or key[0].startswith("backward")] += part.seconds
    return Composed(peak, seconds[False], seconds[True])


def savings(plain: Mode, checkpointed: Mode) -> list[str]:
    """Blocks in the order in which their recomputation is best given up: most seconds for a byte first."""
    seconds: dict[str, float] = {}
    nbytes: dict[str, int] = {}
    for key, piece in plain.pieces.items():
        if not piece.block:
            continue
        other = checkpointed.pieces.get(key, piece)
        seconds[piece.block] = seconds.get(piece.block, 0.0) + other.seconds - piece.seconds
        if key[0].startswith("forward"):
            nbytes[piece.block] = nbytes.get(piece.block, 0) + piece.net - other.net
    return sorted(seconds, key=lambda block: -seconds[block] / max(nbytes.get(block, 0), 1))
