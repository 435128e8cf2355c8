"""A step's time: the longer of what the host needs to issue it and what the device needs to do it."""

from __future__ import annotations

import numpy as np
import pytest

from mapo_fast.hardware.cards import Card, Rates
from mapo_fast.planner.costs import ELEMENTWISE, FETCH, FP8, MATRIX, WAIT
from mapo_fast.planner.timeline import AHEAD, simulate
from mapo_fast.planner.trace import CATEGORIES, Mark, Trace

CARD = Card("a card", 8, 89, Rates(1e12, 2e12, 1e12, 1e12, 1e12, 1e10, 1e10, 1e-6, 10e-6, "chosen"))
US = 1e-3
"""In ms, as times are."""


def trace(
    *operations: tuple[int, float], links: dict[int, int] | None = None, marks: list[Mark] | None = None
) -> Trace:
    """A trace of operations: kinds and their microseconds on `CARD`."""
    kinds, micros = (np.array(column) for column in zip(*operations, strict=True))
    nbytes = np.where(kinds == FETCH, micros * 1e4, 0.0)
    linked = np.full(len(kinds), -1)
    for operation, after in (links or {}).items():
        linked[operation] = after
    live = np.zeros((len(CATEGORIES), len(kinds)), dtype=np.int64)
    flops = np.where(kinds == MATRIX, micros * 1e6, np.where(kinds == FP8, micros * 2e6, 0.0))
    nothing = np.array([], dtype=np.int64)
    return Trace(
        kinds.astype(np.uint8), flops, nbytes, linked, live, live[0], marks or [], nothing, nothing, 0, 0, [0]
    )


def test_the_host_limits_small_operations_and_the_device_large_ones() -> None:
    assert simulate(trace(*[(ELEMENTWISE, 0)] * 100), CARD).step == pytest.approx(1000 * US)
    large = simulate(trace(*[(MATRIX, 50)] * 100), CARD)
    assert large.step == pytest.approx(5000 * US)  # the host is ahead from the step before
    assert large.compute == pytest.approx(5000 * US)


def test_products_in_fp8_have_their_own_rate() -> None:
    work = trace((MATRIX, 100), (FP8, 100))
    assert simulate(work, CARD).compute == pytest.approx(200 * US)
    no_faster = CARD._replace(rates=CARD.rates._replace(fp8=CARD.rates.matrix))
    assert simulate(work, no_faster).compute == pytest.approx(300 * US)


@pytest.mark.parametrize("large_first", [True, False])
def test_small_operations_hide_behind_large_ones_of_this_step_and_the_one_before(large_first: bool) -> None:
    large, small = [(MATRIX, 50)] * 100, [(ELEMENTWISE, 0)] * 300
    operations = large + small if large_first else small + large
    assert simulate(trace(*operations), CARD).step == pytest.approx((5000 + 300) * US, rel=0.01)


def test_the_host_is_not_further_ahead_than_the_launch_queue() -> None:
    operations = [(MATRIX, 50)] * 2 * AHEAD + [(ELEMENTWISE, 0)] * 2 * AHEAD
    least = 2 * AHEAD * 50 + 2 * AHEAD * 1
    assert simulate(trace(*operations), CARD).step > (least + 5 * AHEAD) * US


def test_a_copy_costs_what_sticks_out() -> None:
    hidden = trace((FETCH, 400), (MATRIX, 500), (WAIT, 0), (MATRIX, 100), links={2: 0})
    assert simulate(hidden, CARD).step == pytest.approx(600 * US, rel=0.02)
    seen = trace((FETCH, 900), (MATRIX, 500), (WAIT, 0), (MATRIX, 100), links={2: 0})
    assert simulate(seen, CARD).step == pytest.approx(1000 * US, rel=0.02)


def test_a_step_lasts_as_long_as_all_its_micro_batches() -> None:
    """Two are traced; the second is like all that follow, and the update comes once."""
    operations = [(MATRIX, 300), (MATRIX, 200), (FETCH, 900), (WAIT, 0), (MATRIX, 100), (MATRIX, 50)]
    marks = [Mark(0, "accumulate"), Mark(1, "accumulate"), Mark(5, "finish"), Mark(6, "end")]
    two = trace(*operations, links={3: 2}, marks=marks)._replace(accumulation=2)
    assert simulate(two, CARD).step == pytest.approx((300 + 1200 + 50) * US, rel=0.02)
    many = simulate(two._replace(accumulation=32), CARD)
    assert many.step == pytest.approx((300 + 31 * 1200 + 50) * US, rel=0.02)
    assert many.compute == pytest.approx((300 + 31 * 300 + 50) * US, rel=0.01)
    assert many.transfer == pytest.approx(31 * 900 * US)
    assert len(many.ends) == len(operations)
