"""Sources of preference pairs: a file for each layout. `docs/extend/data_source.md` shows how to add one."""

from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, SkippedRow
from mapo_fast.data.sources.cells import clean_prompt, soft_label, wanted
from mapo_fast.data.sources.listing import Folder, ImageFile, found_in
from mapo_fast.data.sources.registry import find_source, known_sources, open_source, register_source

__all__ = [
    "Folder",
    "ImageFile",
    "MissingImageError",
    "PairRecord",
    "PreferencePairs",
    "SkippedRow",
    "clean_prompt",
    "find_source",
    "found_in",
    "known_sources",
    "open_source",
    "register_source",
    "soft_label",
    "wanted",
]
