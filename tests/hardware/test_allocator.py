"""torch's caching allocator, replayed: small sequences whose outcome follows from its rules."""

from __future__ import annotations

import numpy as np
import pytest

from mapo_fast.hardware.allocator import EXPANDABLE, MIB, CachingAllocator, CapReachedError, Rules
from mapo_fast.planner.replay import Allocator, Replays, cublas_workspace, reserved
from mapo_fast.planner.trace import CATEGORIES, Trace, record_step
from tests.planner.test_recorder import PLANS, REDUCED, settings

DEFAULT = Rules()


@pytest.mark.parametrize(
    ("rules", "sizes", "expected"),
    [
        (DEFAULT, [1], 2 * MIB),
        (DEFAULT, [512] * 4096, 2 * MIB),
        (DEFAULT, [513] * 4096, 4 * MIB),  # 1,024 bytes each
        (DEFAULT, [MIB, MIB], 2 * MIB),
        (DEFAULT, [MIB + 1], 20 * MIB),
        (DEFAULT, [9 * MIB, 9 * MIB], 20 * MIB),
        (DEFAULT, [10 * MIB], 10 * MIB),
        (DEFAULT, [10 * MIB + 1], 12 * MIB),
        (DEFAULT, [11 * MIB, MIB + 512], 32 * MIB),  # a rest of 1 MiB is not split off
        (DEFAULT, [19 * MIB, MIB + 512], 40 * MIB),
        (EXPANDABLE, [1], 2 * MIB),
        (EXPANDABLE, [MIB + 1], 20 * MIB),
        (EXPANDABLE, [21 * MIB], 40 * MIB),
        (EXPANDABLE, [21 * MIB, 19 * MIB], 40 * MIB),
        (EXPANDABLE, [21 * MIB, 19 * MIB + 1], 60 * MIB),
        (EXPANDABLE, [1, 21 * MIB], 42 * MIB),
        (Rules(divisions=4), [1200 * 1024 * 2], 20 * MIB),
        (Rules(divisions=4), [33 * MIB], 40 * MIB),  # from 32 MiB on in parts of 8
        (Rules(segment=64 * MIB), [MIB + 1], 64 * MIB),
        (Rules(segment=64 * MIB), [9 * MIB] * 7, 64 * MIB),
        (Rules(expandable=True, segment=48 * MIB), [21 * MIB, 28 * MIB], 96 * MIB),
    ],
)
def test_what_is_reserved_for_sizes(rules: Rules, sizes: list[int], expected: int) -> None:
    allocator = CachingAllocator(rules)
    for size in sizes:
        allocator.malloc(size)
    assert allocator.reserved == allocator.peak == expected


@pytest.mark.parametrize("rules", [DEFAULT, EXPANDABLE])
def test_what_was_freed_is_used_again(rules: Rules) -> None:
    allocator = CachingAllocator(rules)
    for _ in range(3):
        blocks = [allocator.malloc(size * MIB) for size in (30, 7, 3, 50)]
        for block in (blocks[2], blocks[0], blocks[3], blocks[1]):
            allocator.free(block)
    assert allocator.reserved == 100 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator(DEFAULT)
    large, small = allocator.malloc(40 * MIB), allocator.malloc(20 * MIB)
    allocator.free(large)
    allocator.free(small)
    allocator.malloc(18 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 60 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
@pytest.mark.parametrize("rules", [DEFAULT, EXPANDABLE])
def test_free_neighbours_become_one_block(rules: Rules, order: tuple[int, ...]) -> None:
    allocator = CachingAllocator(rules)
    whole = allocator.malloc(60 * MIB)
    allocator.free(whole)
    parts = [allocator.malloc(20 * MIB) for _ in range(3)]
    for i in order:
        allocator.free(parts[i])
    allocator.malloc(60 * MIB)
    assert allocator.reserved == 60 * MIB


def test_free_segments_are_given_back_at_the_cap() -> None:
    allocator = CachingAllocator(DEFAULT, cap=50 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 40 * MIB
    with pytest.raises(CapReachedError):
        allocator.malloc(20 * MIB)


def held_between(rules: Rules, cap: int) -> CachingAllocator:
    """40 MiB that were split, 10 of them still in use in the middle; then 30 MiB in one piece."""
    allocator = CachingAllocator(rules, cap)
    allocator.free(allocator.malloc(40 * MIB))
    blocks = [allocator.malloc(10 * MIB) for _ in range(4)]
    for i in (0, 1, 3):
        allocator.free(blocks[i])
    allocator.malloc(30 * MIB)
    return allocator


def test_a_segment_that_is_partly_in_use_is_kept_whole_and_pages_are_not() -> None:
    """What `expandable_segments` is for: 40 MiB in use do not fit a cap of 60 MiB, or are all there is."""
    with pytest.raises(CapReachedError):
        held_between(DEFAULT, 60 * MIB)
    assert held_between(DEFAULT, 70 * MIB).reserved == 70 * MIB
    assert held_between(EXPANDABLE, 50 * MIB).reserved == 40 * MIB


def test_pages_that_were_given_back_are_filled_first() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    low, high = allocator.malloc(60 * MIB), allocator.malloc(20 * MIB)
    allocator.free(low)
    allocator.release()
    assert allocator.reserved == 20 * MIB
    again = allocator.malloc(50 * MIB)
    assert again.address < high.address
    assert allocator.reserved == 80 * MIB


def test_large_blocks_are_kept_whole_where_the_user_says_so() -> None:
    allocator = CachingAllocator(Rules(max_split=32 * MIB))
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(12 * MIB)
    assert allocator.reserved == 52 * MIB
    allocator.malloc(33 * MIB)
    assert allocator.reserved == 52 * MIB


@pytest.mark.parametrize(("rounding", "expected"), [(20, 96), (40, 60)])
def test_how_much_larger_a_block_may_be_that_is_kept_whole(rounding: int, expected: int) -> None:
    allocator = CachingAllocator(Rules(max_split=32 * MIB, rounding=rounding * MIB))
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(36 * MIB)
    assert allocator.reserved == expected * MIB


@pytest.mark.parametrize("rules", [DEFAULT, EXPANDABLE])
def test_a_graphs_pool_is_apart_and_stays(rules: Rules) -> None:
    allocator = CachingAllocator(rules, cap=100 * MIB)
    allocator.free(allocator.malloc(40 * MIB, private=True))
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 80 * MIB
    with pytest.raises(CapReachedError):
        allocator.malloc(40 * MIB)
    allocator.malloc(40 * MIB, private=True)
    assert allocator.reserved == 80 * MIB


# --- Traces ---


def trace(sizes: list[int], events: list[int], begins: list[int]) -> Trace:
    """A trace of allocations with sizes in MiB."""
    one = np.zeros(1)
    live = np.zeros((len(CATEGORIES), 1), dtype=np.int64)
    made = np.array(sizes) * MIB
    return Trace(one, one, one, one, live, live[0], [], made, np.array(events), 0, 0, begins)


def on(rules: Rules, *, graphs: bool = False) -> Allocator:
    return Allocator(rules, workspace=10 * MIB, graphs=graphs)


def test_a_run_is_its_first_step_and_many_like_the_last() -> None:
    """A weight; a state that the first step makes; in each step a gradient."""
    steps = trace([40, 100, 60, 100], [0, 1, 2, ~1, 3, ~3], begins=[1, 4])
    workspaces = 2 * 10 * MIB
    assert reserved(steps, on(DEFAULT)) == (40 + 100 + 60) * MIB + workspaces
    assert reserved(steps, on(EXPANDABLE)) == (40 + 100 + 60) * MIB + workspaces
    with pytest.raises(CapReachedError):
        reserved(steps, on(EXPANDABLE), cap=219 * MIB)
    twice = reserved(steps, on(DEFAULT, graphs=True))
    assert twice == (40 + 60 + 2 * 100) * MIB + 2 * workspaces


def test_cublas_workspaces_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # kernel tests on a GPU set it
    assert cublas_workspace(86) == 8_519_680
    assert cublas_workspace(90) == 32 * MIB
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert cublas_workspace(90) == 8_519_680


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "checkpointed"])
def test_a_step_runs_under_the_cap_that_is_said_to_be_needed_and_under_no_less_than_its_tensors(
    name: str,
) -> None:
    step = record_step(settings(**PLANS[name], data={"resolution": 256}), REDUCED)
    for rules in (DEFAULT, EXPANDABLE):
        allocator = Allocator(rules, cublas_workspace(86))
        found = Replays().least(step, allocator)
        assert step.peak + 2 * allocator.workspace < found < 1.5 * step.peak + 60 * MIB
        assert reserved(step, allocator, found) <= found
        assert Replays().needed(step, allocator, 2 * found) == reserved(step, allocator)
        assert Replays().needed(step, allocator, step.peak) > step.peak
        with pytest.raises(CapReachedError):
            reserved(step, allocator, step.peak)
