"""The time of a traced step on a card: the host issues, the card computes, copies run at the same time.

An operation takes as long as its arithmetic or its memory traffic, whichever is longer, and starts when it
has been issued and the one before it is done. A copy starts after the work that was computed when it was
issued, after the copies before it in its direction, and after earlier ones of the same memory; computing
waits for it only where the engine does. So transfers that overlap with computing cost nothing, and others
what sticks out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mapo_fast.hardware.cards import Card, Rates
from mapo_fast.planner.costs import ATTENTION, CONVOLUTION, FETCH, FP8, MATRIX, STORE, WAIT
from mapo_fast.planner.trace import Trace

AHEAD = 1024
"""Operations that may wait in the launch queue of a CUDA stream, as observed; with more the host waits."""


class Times(NamedTuple):
    """Times of one step, in ms."""

    step: float
    compute: float
    """Time of the card's work alone."""
    transfer: float
    """Time of copies in the busier direction of PCIe."""
    ends: np.ndarray
    """(n,) end of each traced operation."""


def durations(trace: Trace, rates: Rates) -> np.ndarray:
    """(n,) seconds of each operation by itself."""
    work = {
        MATRIX: rates.matrix,
        FP8: rates.fp8,
        CONVOLUTION: rates.convolution,
        ATTENTION: rates.attention,
    }
    found = np.maximum(trace.nbytes / rates.memory, rates.launch)
    for kind, rate in work.items():
        chosen = trace.kinds == kind
        found[chosen] = np.maximum(found[chosen], trace.flops[chosen] / rate)
    for kind, rate in ((FETCH, rates.fetch), (STORE, rates.store)):
        chosen = trace.kinds == kind
        found[chosen] = trace.nbytes[chosen] / rate
    found[trace.kinds == WAIT] = 0.0
    return found


def simulate(trace: Trace, card: Card) -> Times:
    """Run the step's operations in order on a card, one step after another.

    If a step has more micro-batches than were traced, each further one takes as long as a traced one.
    """
    times = _simulated(trace, card)
    more = trace.accumulation - trace.micro_batches
    if not more:
        return times
    longer = _simulated(trace.with_one_more(), card)
    step, compute, transfer = (
        some + more * (longer_by - some) for some, longer_by in zip(times[:3], longer[:3], strict=True)
    )
    return Times(step, compute, transfer, times.ends)


def _simulated(trace: Trace, card: Card) -> Times:
    """Times of the micro-batches that were traced."""
    seconds = durations(trace, card.rates)
    _, computed, issued = _run(trace, seconds, card.rates.host, 0.0)
    # Where the device ends later than the host, the host has begun the next step by then.
    ends, computed, issued = _run(trace, seconds, card.rates.host, min(0.0, issued - computed))
    copies = [float(seconds[trace.kinds == kind].sum()) for kind in (FETCH, STORE)]
    compute = float(seconds.sum()) - sum(copies)
    return Times(1e3 * max(computed, issued), 1e3 * compute, 1e3 * max(copies), ends)


def _run(trace: Trace, seconds: np.ndarray, host: float, issued: float) -> tuple[np.ndarray, float, float]:
    """End of each operation, and the times at which the last one is computed and issued.

    The device is free from 0 on; the host begins at `issued`, and waits when it is `AHEAD` of the device.
    """
    ends = [0.0] * len(seconds)
    computed = 0.0
    queues = {FETCH: 0.0, STORE: 0.0}
    rows = zip(trace.kinds.tolist(), seconds.tolist(), trace.links.tolist(), strict=True)
    for i, (kind, duration, link) in enumerate(rows):
        issued += host
        if i >= AHEAD:
            issued = max(issued, ends[i - AHEAD])
        behind = ends[link] if link >= 0 else 0.0
        if kind == WAIT:
            computed = ends[i] = max(computed, behind)
        elif kind in queues:
            queues[kind] = ends[i] = max(issued, computed, queues[kind], behind) + duration
        else:
            computed = ends[i] = max(issued, computed) + duration
    return np.array(ends), computed, issued
