"""How long a traced step takes on a card: the host issues, the card computes, copies run beside both.

An operation takes as long as its arithmetic or its memory traffic, whichever is longer, and starts when it
has been issued and the one before it is done. A copy starts behind what was computed when it was issued,
behind the copies before it in its direction, and behind earlier ones of the same memory; computing waits
for it only where the engine does. So transfers that hide behind computing cost nothing, and others what
sticks out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mapo_fast.planner.cards import ATTAINED, HOST_US, LAUNCH_US, Card
from mapo_fast.planner.costs import ATTENTION, CONVOLUTION, ELEMENTWISE, FETCH, MATRIX, STORE, WAIT
from mapo_fast.planner.trace import Trace

_SHARES = {MATRIX: "matrix", CONVOLUTION: "convolution", ATTENTION: "attention", ELEMENTWISE: "elementwise"}


class Times(NamedTuple):
    """Of one step, in ms."""

    step: float
    compute: float
    """The card's work alone."""
    transfer: float
    """The busier of the two directions of PCIe."""
    ends: np.ndarray
    """(n,) when each operation ends."""


def durations(trace: Trace, card: Card) -> np.ndarray:
    """Seconds of each operation by itself, (n,)."""
    rates = np.full(max(*_SHARES, FETCH, STORE, WAIT) + 1, np.inf)
    for kind, share in _SHARES.items():
        rates[kind] = ATTAINED[share] * card.tflops * 1e12
    traffic = trace.nbytes / (ATTAINED["elementwise"] * card.gbps * 1e9)
    found = np.maximum(np.maximum(trace.flops / rates[trace.kinds], traffic), LAUNCH_US * 1e-6)
    copies = (trace.kinds == FETCH) | (trace.kinds == STORE)
    found[copies] = trace.nbytes[copies] / (ATTAINED["pcie"] * card.pcie_gbps * 1e9)
    found[trace.kinds == WAIT] = 0.0
    return found  # type: ignore[no-any-return]


def simulate(trace: Trace, card: Card) -> Times:
    """Run the step's operations in order on a card."""
    seconds = durations(trace, card)
    ends = np.zeros(len(seconds))
    issued = computed = 0.0
    queues = {FETCH: 0.0, STORE: 0.0}
    rows = zip(trace.kinds.tolist(), seconds.tolist(), trace.links.tolist(), strict=True)
    for i, (kind, duration, link) in enumerate(rows):
        issued += HOST_US * 1e-6
        behind = ends[link] if link >= 0 else 0.0
        if kind == WAIT:
            computed = ends[i] = max(computed, behind)
        elif kind in queues:
            queues[kind] = ends[i] = max(issued, computed, queues[kind], behind) + duration
        else:
            computed = ends[i] = max(issued, computed) + duration
    copies = [float(seconds[trace.kinds == kind].sum()) for kind in queues]
    compute = float(seconds.sum()) - sum(copies)
    return Times(1e3 * max(computed, issued), 1e3 * compute, 1e3 * max(copies), ends)
