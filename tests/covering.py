"""Fewer combinations of many settings that still show what any three of them do to each other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering(rows: Sequence[tuple[Hashable, ...]], strength: int = 3) -> list[int]:
    """Numbers of rows in which any `strength` values meet that meet in some row: a covering array, greedily.

    Args:
        rows: all that is allowed, one value for each setting.
    """
    meets = [set(combinations(enumerate(row), strength)) for row in rows]
    missing = set().union(*meets)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(meets[i] & missing))
        missing -= meets[best]
        chosen.append(best)
    return sorted(chosen)


def covering_plans(plans: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Numbers of plans in which every value stands that a setting has in any of them.

    Args:
        plans: values by the settings' names; a name that is missing counts as a value.
    """
    names = sorted({name for plan in plans for name in plan})
    return covering([tuple(plan.get(name) for name in names) for plan in plans], strength=1)
