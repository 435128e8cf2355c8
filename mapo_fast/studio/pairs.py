"""Which pair is next: random, and never the same one twice but for a few repeats with the sides exchanged.

A prompt is drawn among those that have a pair left, then one of its pairs. `REPEATS` of the pairs were voted
on before, at least `AGO` votes ago: how often both answers agree says how sure the voter is.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from math import comb
from typing import NamedTuple

from mapo_fast.studio.votes import Vote, key

REPEATS = 0.05
AGO = 10
_LISTED = 2000
"""Most pairs of a prompt to list; among more, pairs are drawn until one is new."""
_DRAWS = 200


class Pair(NamedTuple):
    """Two pictures to choose from."""

    id: str
    prompt: str
    left: int
    right: int
    mirrored: bool


class Draw(NamedTuple):
    """Two pictures of a prompt, by their numbers."""

    prompt: str
    one: int
    other: int


def draw(
    members: dict[str, list[int]],
    left_out: Collection[str],
    seen: dict[str, set[tuple[int, int]]],
    rng: random.Random,
) -> Draw | None:
    """A pair that is not in `seen`, of a prompt that is not in `left_out`; None where there is none."""
    prompts = [prompt for prompt, ids in members.items() if len(ids) > 1 and prompt not in left_out]
    while prompts:
        at = rng.randrange(len(prompts))
        prompt = prompts[at]
        found = _of_prompt(members[prompt], seen.get(prompt, set()), rng)
        if found is not None:
            return Draw(prompt, *found)
        prompts[at] = prompts[-1]
        prompts.pop()
    return None


def _of_prompt(ids: Sequence[int], seen: set[tuple[int, int]], rng: random.Random) -> tuple[int, int] | None:
    total = comb(len(ids), 2)
    if total <= _LISTED:
        left = [pair for pair in combinations(ids, 2) if pair not in seen]
        return rng.choice(left) if left else None
    for _ in range(_DRAWS):
        one, other = sorted(rng.sample(ids, 2))
        if (one, other) not in seen:
            return one, other
    return None


def repeat(votes: Sequence[Vote], is_open: Callable[[str], bool], rng: random.Random) -> Vote | None:
    """An old vote to ask again; None where there is none."""
    again = {vote.key for vote in votes if vote.mirrored}
    old = [
        vote
        for vote in votes[: max(0, len(votes) - AGO)]
        if not vote.mirrored and vote.key not in again and not is_open(pair_id(vote.key, mirrored=True))
    ]
    return rng.choice(old) if old else None


def pair_id(files: tuple[str, str], *, mirrored: bool) -> str:
    """The id of a pair of files, given by their SHA-256."""
    return hashlib.sha256("\0".join(key(*files)).encode()).hexdigest()[:24] + ("m" if mirrored else "")


def agreement(votes: Sequence[Vote]) -> tuple[int, int]:
    """How many repeated pairs got the same answer, and how many there are."""
    first = {vote.key: vote for vote in votes if not vote.mirrored}
    again = [(first[vote.key], vote) for vote in votes if vote.mirrored and vote.key in first]
    same = sum(a.winner == b.winner for a, b in again)
    return same, len(again)
