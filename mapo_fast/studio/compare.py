"""Blind comparisons: `comparisons/NUMBER` in the project.

| name              | what it is                                                                      |
|-------------------|---------------------------------------------------------------------------------|
| `comparison.json` | models, settings, the number of votes and the order, all fixed before the first |
| `prompts.jsonl`   | the prompts for `mapo-fast sample`                                               |
| `base/`, `result/`| their images                                                                    |
| `votes.jsonl`     | a line for each vote and each undo                                              |

Which model is which is told after the last vote, and votes cannot be taken back then. Prompts that were
trained on are counted apart.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from mapo_fast.data.prompt_text import plain
from mapo_fast.score.manifest import Made, paired
from mapo_fast.score.statistics import FEWEST_FOR_WIN_RATE, Interval, sign_test, wilson
from mapo_fast.studio.records import Records
from mapo_fast.studio.seal import is_sealed, seal
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import atomic_path, disk_errors, read_json, write_json

FOLDER = "comparisons"
SIDES = ("base", "result")
Choice = Literal["left", "right", "tie"]
_RECORD = "comparison.json"


class Trial(NamedTuple):
    """Two images to choose from."""

    number: int
    prompt: str
    left: Path
    right: Path


class Rate(NamedTuple):
    """How often the result won."""

    votes: int
    rate: float
    """(Wins + ½ ties) / votes."""
    interval: Interval | None
    """95 %; None where there are too few votes."""
    p: float
    """p-value of the sign test."""


class Answer(NamedTuple):
    """What a comparison says."""

    unvoted: Rate | None
    """On prompts that were not trained on; None where there are none."""
    voted: Rate | None
    """On prompts that were."""


def create(
    project: Path,
    models: Sequence[Sequence[str]],
    *,
    unvoted: Sequence[str],
    voted: Sequence[str] = (),
    seeds: int = 1,
    votes: int,
    sampling: Sequence[str] = (),
) -> Comparison:
    """Write down a comparison.

    Args:
        project: its folder.
        models: of base and result, the arguments of `mapo-fast sample` that name it, such as
            `["base.safetensors", "--lora", "result.safetensors:0.8"]`.
        unvoted: prompts that were not trained on.
        voted: prompts that were.
        seeds: images of each prompt.
        votes: how many, at most one for each prompt and seed.
        sampling: more arguments of `mapo-fast sample`, the same for both.

    Raises:
        UserError: too few or too many votes; the disk.
    """
    prompts = list(dict.fromkeys((*unvoted, *voted)))
    most = len(prompts) * seeds
    if not FEWEST_FOR_WIN_RATE <= votes <= most:
        raise UserError(
            f"{votes} votes of {most} pairs of images: take {FEWEST_FOR_WIN_RATE} or more, and at most as "
            "many as there are pairs (add prompts or seeds)"
        )
    parent = project / FOLDER
    with disk_errors(parent):
        parent.mkdir(exist_ok=True)
        last = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
        folder = parent / f"{last + 1:04d}"
        folder.mkdir()
    path = folder / "prompts.jsonl"
    with disk_errors(path), atomic_path(path) as temporary:
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        temporary.write_text("".join(lines), encoding="utf-8")
    record = {
        "models": [list(model) for model in models],
        "sampling": list(sampling),
        "seeds": seeds,
        "votes": votes,
        "unvoted": list(unvoted),
        "order": random.SystemRandom().getrandbits(64),
        "time": time.time(),
    }
    write_json(folder / _RECORD, {**record, "seal": seal(record)})
    return Comparison(folder)


def comparisons(project: Path) -> list[str]:
    """Names of a project's comparisons, the newest first."""
    return sorted((path.parent.name for path in (project / FOLDER).glob(f"*/{_RECORD}")), reverse=True)


class Comparison:
    """A comparison's state, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record = read_json(folder / _RECORD)
        self._votes = Records(folder / "votes.jsonl")
        self._trials: list[tuple[bool, Trial, bool]] | None = None

    @classmethod
    def open(cls, project: Path, name: str) -> Comparison:
        """A comparison by its name.

        Raises:
            UserError: there is none, or its record is damaged.
        """
        if name not in comparisons(project):
            raise UserError(f"there is no comparison {shown(name)}")
        return cls(project / FOLDER / name)

    @property
    def count(self) -> int:
        """The number of votes that was fixed."""
        return int(self._record["votes"])

    @property
    def models(self) -> list[list[str]]:
        """What was compared; to be shown after the last vote."""
        return [list(map(str, model)) for model in self._record["models"]]

    def commands(self) -> list[list[str]]:
        """The two jobs that make the images, as arguments of `mapo-fast`.

        Raises:
            UserError: this user did not make the comparison on this machine.
        """
        record = {name: value for name, value in self._record.items() if name != "seal"}
        if not is_sealed(record, self._record.get("seal")):
            raise UserError(f"{self.folder} was made on another machine: start a new comparison")
        return [
            [
                *(
                    "sample",
                    "--prompts",
                    str(self.folder / "prompts.jsonl"),
                    "--out",
                    str(self.folder / side),
                ),
                *("--seeds", str(self._record["seeds"])),
                *map(str, self._record["sampling"]),
                *model[1:],
                *("--", model[0]),
            ]
            for side, model in zip(SIDES, self.models, strict=True)
        ]

    def trials(self) -> list[Trial]:
        """All pairs in the order of voting.

        Raises:
            UserError: images are missing.
        """
        return [trial for _, trial, _ in self._ordered()]

    def _ordered(self) -> list[tuple[bool, Trial, bool]]:
        """Whether the result is on the left, the pair, and whether its prompt was not trained on."""
        if self._trials is None:
            base, result = paired([self.folder / side for side in SIDES])
            rng = random.Random(int(self._record["order"]))
            both = list(zip(base, result, strict=True))
            if len(both) < self.count:
                raise UserError(
                    f"{self.folder} has images for {len(both)} votes of {self.count}: sample again"
                )
            rng.shuffle(both)
            unvoted = {plain(prompt)[0] for prompt in self._record["unvoted"]}  # as `sample` reads them
            self._trials = [
                self._trial(number, pair, swapped=rng.random() < 0.5, unvoted=pair[0].prompt in unvoted)
                for number, pair in enumerate(both[: self.count])
            ]
        return self._trials

    @staticmethod
    def _trial(
        number: int, pair: tuple[Made, Made], *, swapped: bool, unvoted: bool
    ) -> tuple[bool, Trial, bool]:
        left, right = reversed(pair) if swapped else pair
        return swapped, Trial(number, left.prompt, left.path, right.path), unvoted

    def answers(self) -> list[Choice]:
        """The answers so far, by trial."""
        found: list[Choice] = []
        for line in self._votes.lines:
            if line.get("undo") == len(found) - 1:
                found.pop()
            elif line.get("trial") == len(found) and line.get("answer") in get_args(Choice):
                found.append(line["answer"])
        return found

    def next(self) -> Trial | None:
        """The pair to show; None after the last vote."""
        done = len(self.answers())
        return None if done >= self.count else self.trials()[done]

    def vote(self, number: int, answer: Choice) -> None:
        """Write a vote down; the same vote again changes nothing.

        Raises:
            UserError: another pair's turn, or an unknown answer; the disk.
        """
        if answer not in get_args(Choice):
            raise UserError(f"answer {shown(answer)}: must be one of {', '.join(get_args(Choice))}")
        answers = self.answers()
        if number == len(answers) - 1 and answers[-1] == answer:
            return
        if number != len(answers) or number >= self.count:
            raise UserError("this pair is not the next one: load the page again")
        self._votes.append({"trial": number, "answer": answer, "time": time.time()})

    def undo(self) -> None:
        """Take the last vote back.

        Raises:
            UserError: all votes are given, so the answer is known; the disk.
        """
        answers = self.answers()
        if len(answers) >= self.count:
            raise UserError("all votes are given: start another comparison to vote again")
        if answers:
            self._votes.append({"undo": len(answers) - 1, "time": time.time()})

    def result(self) -> Answer | None:
        """The answer; None before the last vote."""
        answers = self.answers()
        if len(answers) < self.count:
            return None
        scores: dict[bool, list[float]] = {True: [], False: []}
        for (swapped, _, unvoted), answer in zip(self._ordered(), answers, strict=True):
            ours = "left" if swapped else "right"
            scores[unvoted].append(0.5 if answer == "tie" else float(answer == ours))
        return Answer(_rate(scores[True]), _rate(scores[False]))


def _rate(scores: Sequence[float]) -> Rate | None:
    if not scores:
        return None
    n, wins, losses = len(scores), scores.count(1.0), scores.count(0.0)
    rate = sum(scores) / n
    enough = n >= FEWEST_FOR_WIN_RATE
    interval = wilson(rate, n, (n - wins - losses) / n) if enough else None
    return Rate(n, rate, interval, sign_test(wins, losses))
