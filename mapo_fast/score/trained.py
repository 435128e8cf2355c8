"""Prompts that a run was trained on."""

from __future__ import annotations

from pathlib import Path

from mapo_fast.data.cache import PairCache
from mapo_fast.run.folder import RECORD, recorded_settings
from mapo_fast.util.errors import UserError


def prompts_of(path: Path) -> frozenset[str]:
    """The prompts of the training pairs.

    Args:
        path: a run's folder, whose cache is still where it was, or a cache.

    Raises:
        UserError: it is neither, or the cache is missing or damaged.
    """
    cache = path
    if (path / RECORD).is_file():
        recorded = recorded_settings(path)
        if recorded is None:
            raise UserError(f"{path} does not say which cache it was trained on: name the cache")
        cache = Path(recorded["data"]["cache"])
    opened = PairCache.open(cache)
    return frozenset(row.prompt for row in opened.rows(opened.train[:]))
