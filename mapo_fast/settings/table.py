"""The table of all settings, and the lists that are read off it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mapo_fast.settings.declare import Affects, Planned, Setting, rows
from mapo_fast.settings.schema import Config

TABLE = rows(Config)


def affecting(what: Affects, table: Sequence[Setting] = TABLE) -> list[Setting]:
    """The settings that affect something, see `Affects`."""
    return [row for row in table if what in row.affects]


def planned(how: Planned, table: Sequence[Setting] = TABLE) -> dict[str, tuple[Any, ...]]:
    """The settings that the planner may choose in this way, with their values, the default first."""
    return {row.name: row.choices for row in table if row.planned == how}


def kept_at_resume(table: Sequence[Setting] = TABLE) -> list[str]:
    """Names of settings that the planner may choose and that a resumed run has to keep."""
    return [row.name for row in affecting("arithmetic", table) if row.planned != "no"]


def on_cpu(table: Sequence[Setting] = TABLE) -> dict[str, Any]:
    """Defaults of a run on the CPU, where they differ: by measurement (`bench.train_step`)."""
    return {row.name: row.on_cpu for row in table if row.on_cpu != row.default}


def paths(table: Sequence[Setting] = TABLE) -> list[str]:
    """Names of settings whose values are files and folders."""
    return [row.name for row in table if row.is_path]


def value_of(config: Config, name: str) -> Any:
    """The value of `section.key`."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def flat(config: Config) -> dict[str, Any]:
    """`section.key` → value, of all settings."""
    return {row.name: value_of(config, row.name) for row in TABLE}
