"""Votes: `votes.jsonl` in the project, a line for each vote and for each undo.

| field                         | of a vote                                                     |
|-------------------------------|---------------------------------------------------------------|
| `pair`                        | the pair's id                                                 |
| `prompt`                      | the pair's prompt                                             |
| `left`, `right`               | the pictures' paths in the project, as they were shown        |
| `left_sha256`, `right_sha256` | of the files                                                  |
| `mirrored`                    | whether the pair had a vote before, with the sides exchanged  |
| `answer`                      | `left`, `right`, `tie` or `both_bad`                          |
| `seconds`, `time`             | how long it was looked at; when (Unix seconds)                |

An undo has `undo`, the pair's id, and `time`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mapo_fast.studio.answers import Answer
from mapo_fast.studio.records import Records
from mapo_fast.util.errors import UserError, shown

FILE = "votes.jsonl"


@dataclass(frozen=True)
class Vote:
    """One answer."""

    pair: str
    prompt: str
    left: str
    right: str
    left_sha256: str
    right_sha256: str
    mirrored: bool
    answer: Answer
    seconds: float
    time: float

    @property
    def key(self) -> tuple[str, str]:
        """The two files, whichever side they were on."""
        return key(self.left_sha256, self.right_sha256)

    @property
    def winner(self) -> str | None:
        """SHA-256 of the file that won; None for a tie and for «both bad»."""
        return {"left": self.left_sha256, "right": self.right_sha256}.get(self.answer)


def key(one: str, other: str) -> tuple[str, str]:
    """Two files without their order."""
    return (one, other) if one < other else (other, one)


class Votes:
    """The votes of a project that count."""

    def __init__(self, folder: Path) -> None:
        self._records = Records(folder / FILE)
        self.damaged = len(self._records.damaged)
        """Lines of the file that are no votes."""
        self._by_pair: dict[str, Vote] = {}
        for line in self._records.lines:
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if isinstance(line.get("undo"), str):
            self._by_pair.pop(line["undo"], None)
            return
        vote = _parsed(line)
        if vote is None:
            self.damaged += 1
        else:
            self._by_pair.setdefault(vote.pair, vote)

    def __len__(self) -> int:
        """The number of votes that count."""
        return len(self._by_pair)

    def all(self) -> list[Vote]:
        """In the order in which they were given."""
        return list(self._by_pair.values())

    def find(self, pair: str) -> Vote | None:
        """The vote of a pair."""
        return self._by_pair.get(pair)

    def add(self, vote: Vote) -> bool:
        """Write a vote down; False where the pair has the same answer already.

        Raises:
            UserError: the pair has another answer, or the disk; then nothing has changed.
        """
        if vote.answer not in get_args(Answer):
            raise UserError(f"answer {shown(vote.answer)}: must be one of {', '.join(get_args(Answer))}")
        found = self._by_pair.get(vote.pair)
        if found is not None:
            if found.answer == vote.answer:
                return False
            raise UserError("this pair has a vote already: undo it first")
        self._records.append(asdict(vote))
        self._by_pair[vote.pair] = vote
        return True

    def undo(self) -> Vote | None:
        """Take the last vote back; None where there is none.

        Raises:
            UserError: the disk; then nothing has changed.
        """
        if not self._by_pair:
            return None
        last = next(reversed(self._by_pair.values()))
        self._records.append({"undo": last.pair, "time": time.time()})
        del self._by_pair[last.pair]
        return last


_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("pair", "prompt", "left", "right", "left_sha256", "right_sha256"), str),
    "mirrored": bool,
    "answer": str,
    **dict.fromkeys(("seconds", "time"), (int, float)),
}


def _parsed(line: dict[str, Any]) -> Vote | None:
    """The vote of a line; None where a field is missing or of another kind."""
    values = {name: line.get(name) for name in _FIELDS}
    if not all(isinstance(values[name], kind) for name, kind in _FIELDS.items()):
        return None
    return Vote(**values) if values["answer"] in get_args(Answer) else None  # type: ignore[arg-type]
