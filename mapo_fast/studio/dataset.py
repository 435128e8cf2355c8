"""From votes to what `mapo-fast train` reads: `pairs.jsonl`, with the pictures linked or copied beside it.

Pairs are those with a majority for one picture; `label` is its share where labels are soft. Single pictures,
for `kto`, are liked where they have only won, and disliked where they were «both bad» and never won.

Ties, and pairs whose repeats disagree, are dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.data.leak import Colour, Made, colour_leaks, made_leaks, size_leaks
from mapo_fast.studio.pictures import Picture
from mapo_fast.studio.votes import Vote
from mapo_fast.util.errors import UserError
from mapo_fast.util.folders import new_folder

TABLE = "pairs.jsonl"


class Decided(NamedTuple):
    """A pair with a majority: the files by their SHA-256."""

    prompt: str
    chosen: str
    rejected: str
    share: float
    """Votes for the chosen picture, as a share of those for either."""


class Single(NamedTuple):
    """A picture that was liked or not."""

    prompt: str
    image: str
    liked: bool


def decided(votes: Iterable[Vote]) -> list[Decided]:
    """Pairs with a majority, in the order of their first votes; ties and «both bad» count for nobody."""
    wins: dict[tuple[str, tuple[str, str]], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote.winner is not None:
            wins[vote.prompt, vote.key][vote.winner] += 1
    found = []
    for (prompt, files), counts in wins.items():
        (chosen, most), total = counts.most_common(1)[0], counts.total()
        if 2 * most > total:
            rejected = files[0] if chosen == files[1] else files[1]
            found.append(Decided(prompt, chosen, rejected, most / total))
    return found


def singles(votes: Sequence[Vote]) -> list[Single]:
    """Liked and disliked pictures; one that won once and was bad once is neither."""
    good: dict[tuple[str, str], None] = {}
    bad: dict[tuple[str, str], None] = {}
    lost: set[tuple[str, str]] = set()
    for vote in votes:
        files = [(vote.prompt, vote.left_sha256), (vote.prompt, vote.right_sha256)]
        if vote.answer == "both_bad":
            bad.update(dict.fromkeys(files))
        elif vote.winner is not None:
            good[vote.prompt, vote.winner] = None
            lost.update(file for file in files if file[1] != vote.winner)
    liked = [Single(*file, liked=True) for file in good if file not in bad and file not in lost]
    return liked + [Single(*file, liked=False) for file in bad if file not in good]


def write_pairs(
    folder: Path, pairs: Sequence[Decided], file_of: Callable[[str], Path | None], *, soft: bool = False
) -> int:
    """Write a data set of pairs; the number of rows, without those whose pictures are gone.

    Raises:
        UserError: no pair is left; the disk.
    """

    def row(pair: Decided, name: Callable[[str], str]) -> dict[str, Any]:
        label = {"label": pair.share} if soft else {}
        return {"prompt": pair.prompt, "chosen": name(pair.chosen), "rejected": name(pair.rejected)} | label

    return _write(folder, [((one.chosen, one.rejected), one) for one in pairs], row, file_of)


def write_singles(folder: Path, found: Sequence[Single], file_of: Callable[[str], Path | None]) -> int:
    """Write a data set of single pictures, for `kto`; see `write_pairs`."""

    def row(one: Single, name: Callable[[str], str]) -> dict[str, Any]:
        return {"prompt": one.prompt, "image": name(one.image), "label": one.liked}

    return _write(folder, [((one.image,), one) for one in found], row, file_of)


def _write(
    folder: Path,
    rows: Sequence[tuple[tuple[str, ...], Any]],
    row: Callable[[Any, Callable[[str], str]], dict[str, Any]],
    file_of: Callable[[str], Path | None],
) -> int:
    files = {digest: file_of(digest) for digest in dict.fromkeys(d for digests, _ in rows for d in digests)}
    kept = [(digests, one) for digests, one in rows if all(files[digest] is not None for digest in digests)]
    if not kept:
        raise UserError("no vote has chosen a picture that is still there: vote first")

    def name(digest: str) -> str:
        return f"images/{digest[:32]}{(files[digest] or Path()).suffix.lower()}"

    with new_folder(folder) as new:
        (new / "images").mkdir()
        lines = [json.dumps(row(one, name), ensure_ascii=False) for _, one in kept]
        for digest in {d for digests, _ in kept for d in digests}:
            _put(files[digest] or Path(), new / name(digest))
        (new / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(kept)


def _put(file: Path, target: Path) -> None:
    """A second name for the file where the disk can give one, else a copy."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def leaks(pairs: Sequence[tuple[Picture, Picture]], colours: dict[int, float]) -> list[str]:
    """Warnings of the data card about pairs of a chosen and a rejected picture.

    Args:
        pairs: chosen, rejected.
        colours: mean saturation of pictures that the job `looks` has seen.
    """
    if not pairs:
        return []
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    sizes = [[(p.height, p.width) for p in half] for half in (chosen, rejected)]
    made = [[Made(p.model, p.sampler, p.lora) for p in half] for half in (chosen, rejected)]
    warnings = size_leaks(sizes[0], sizes[1], "shared") + made_leaks(*made)
    known = [pair for pair in pairs if all(p.id in colours for p in pair)]
    if known:
        seen = [[Colour(0.0, colours[pair[side].id]) for pair in known] for side in (0, 1)]
        warnings += colour_leaks(*seen)
    return warnings
