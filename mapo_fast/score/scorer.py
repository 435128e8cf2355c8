"""The interface of scorers, and their table.

A scorer takes images with their prompts and gives a number for each; higher is better. Weights come from
paths that the user names; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Scorer(Protocol):
    """Scores images."""

    version: str
    """Changes whenever the same weights would give other scores: part of the cache's key."""
    sha256: str
    """SHA-256 of the loaded weights; empty without weights."""

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Score RGB images: (n,) float32, one for each image and its prompt."""


class Entry(NamedTuple):
    """A scorer that `--score` can name."""

    make: Callable[[Sequence[Path]], Scorer]
    """Loads the scorer from its files."""
    files: tuple[str, ...]
    """Description of each file, in order; empty for a scorer without weights."""
    about: str


_ENTRIES: dict[str, Entry] = {}


def register_scorer(name: str, entry: Entry) -> None:
    """Add a scorer.

    Raises:
        ValueError: the name is taken, or is no plain word.
    """
    if not name.isidentifier():
        raise ValueError(f"a scorer's name is a plain word, not {name!r}")
    if name in _ENTRIES:
        raise ValueError(f"there is a scorer {name!r} already")
    _ENTRIES[name] = entry


def scorer_names() -> list[str]:
    """The names that `--score` takes."""
    return [*_ENTRIES]


def load_scorer(text: str) -> tuple[str, Scorer]:
    """Name and scorer of `NAME`, `NAME=PATH` or `NAME=PATH,PATH`.

    Raises:
        UserError: no such scorer, too few or too many files, or files that it cannot use.
    """
    name, _, paths = text.partition("=")
    entry = _ENTRIES.get(name)
    if entry is None:
        raise UserError(f"--score {name}: there is no such scorer; there are {', '.join(_ENTRIES)}")
    given = [Path(path) for path in paths.split(",") if path]
    wanted = "".join(f",{file}" for file in entry.files).replace(",", "=", 1)
    if len(given) != len(entry.files):
        raise UserError(f"--score {text}: write --score {name}{wanted}")
    for path in given:
        if not path.exists():
            raise UserError(f"--score {name}: {path} does not exist")
    return name, entry.make(given)
