"""All known layouts, and the search for the one of a path.

They are asked in order, and the first that recognises the path opens it: those that were registered, the last
one first, then the built-in ones, then those of installed packages (`util.extensions`). Of the built-in ones,

1. `pairs.jsonl` wins over twin folders, which may hold its images;
2. twin folders, `chosen/` + `rejected/` or `w/` + `l/`, win over tables that lie in them;
3. a dataset that `datasets` saved, or arrow files;
4. parquet files, which win over arrow files next to them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar

from mapo_fast.data.sources.base import PreferencePairs, reading
from mapo_fast.data.sources.datasets import DatasetPairs
from mapo_fast.data.sources.folders import TwinFolderPairs
from mapo_fast.data.sources.jsonl import JsonlPairs
from mapo_fast.data.sources.pairing import OrderedPairs, PromptPairs
from mapo_fast.data.sources.parquet import ParquetPairs
from mapo_fast.data.sources.unknown import what_it_is
from mapo_fast.util.errors import UserError
from mapo_fast.util.extensions import load_installed
from mapo_fast.util.files import check_regular

_BUILT_IN: tuple[type[PreferencePairs], ...] = (JsonlPairs, TwinFolderPairs, DatasetPairs, ParquetPairs)
_registered: list[type[PreferencePairs]] = []

PairBy = Literal["name", "order", "prompt"]
S = TypeVar("S", bound=PreferencePairs)


def register_source(source: type[S]) -> type[S]:
    """Have `data.source` name paths in another layout too; also usable as a decorator.

    It is asked before all others. Registering a class again changes nothing.

    Args:
        source: a class with `looked_for` and all methods of `PreferencePairs`.

    Raises:
        TypeError: it lacks one of them.
    """
    missing = sorted(source.__abstractmethods__) + ([] if hasattr(source, "looked_for") else ["looked_for"])
    if missing:
        raise TypeError(f"{source.__name__} is no source of preference pairs: it lacks {', '.join(missing)}")
    if source not in _registered:
        _registered.insert(0, source)
    return source


def known_sources() -> tuple[type[PreferencePairs], ...]:
    """All layouts, in the order in which they are asked."""
    return (*_registered, *_BUILT_IN)


def find_source(path: Path) -> type[PreferencePairs]:
    """The layout that a path is kept in. No file is read, and neither torch nor numpy is imported.

    Raises:
        UserError: there is nothing, or nothing in a known layout.
        MachineError: I/O failed.
    """
    with reading(path):
        if not os.path.lexists(path):
            raise UserError(f"data.source not found: {path}")
        if path.is_dir():
            next(path.iterdir(), None)  # a folder without permission raises here, and would look empty below
        else:
            check_regular(path, path.stat().st_mode)
        if (found := _recognised(path)) is not None:
            return found
        problems = load_installed()
        if (found := _recognised(path)) is not None:
            return found
        found_there = what_it_is(path, _recognised)
    looked_for = ", ".join(dict.fromkeys(source.looked_for for source in known_sources()))
    unknown = found_there or f"has no layout that is known here; looked for {looked_for}"
    raise UserError("; ".join([f"data.source {path} {unknown}", *problems]))


def _recognised(path: Path) -> type[PreferencePairs] | None:
    return next((source for source in known_sources() if source.recognises(path)), None)


def open_source(
    path: Path, *, default_caption: str | None = None, pair_by: PairBy = "name"
) -> PreferencePairs:
    """The preference pairs at a path; of images nothing is read but, for pair_by "prompt", metadata.

    Args:
        path: a file or folder.
        default_caption: the prompt of images that have none; without it they are skipped.
        pair_by: which files of twin folders are a pair.

    Raises:
        UserError: as `find_source`; or the layout is ambiguous or unreadable.
        MachineError: I/O failed.
    """
    source = find_source(path)
    if pair_by != "name":
        if source is not TwinFolderPairs:
            raise UserError(
                f'data.pair_by = "{pair_by}" is for two folders of images, {TwinFolderPairs.looked_for}, and '
                f"data.source {path} is {source.looked_for}: leave it out"
            )
        source = {"order": OrderedPairs, "prompt": PromptPairs}[pair_by]
    with reading(path):
        pairs = source.open(path)
    pairs.where, pairs.default_caption = path, default_caption or ""
    return pairs
