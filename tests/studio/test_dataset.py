"""Votes become data sets: majorities, single likes, and warnings about what else they follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapo_fast.data.sources import PairRecord, open_source
from mapo_fast.studio.answers import Answer
from mapo_fast.studio.dataset import Decided, Single, decided, singles
from mapo_fast.studio.project import Project
from mapo_fast.studio.votes import Vote
from mapo_fast.util.errors import UserError
from tests.studio.conftest import Opener
from tests.studio.pictures import painted


def vote(left: str, right: str, answer: Answer, mirrored: bool = False) -> Vote:
    return Vote(f"{left}{right}{mirrored}", "p", left, right, left, right, mirrored, answer, 1.0, 0.0)


def test_the_majority_decides_and_ties_are_dropped() -> None:
    votes = [
        vote("a", "b", "left"),
        vote("c", "d", "left"),
        vote("d", "c", "left", mirrored=True),
        vote("e", "f", "tie"),
        vote("g", "h", "right"),
        vote("h", "g", "left", mirrored=True),
        vote("i", "j", "both_bad"),
        vote("k", "l", "left"),
        vote("l", "k", "tie", mirrored=True),
    ]
    assert decided(votes) == [
        Decided("p", "a", "b", 1.0),
        Decided("p", "h", "g", 1.0),
        Decided("p", "k", "l", 1.0),
    ]


def test_single_likes_and_both_bad() -> None:
    votes = [
        vote("a", "b", "left"),
        vote("b", "c", "left"),
        vote("c", "d", "both_bad"),
        vote("a", "d", "left"),
        vote("e", "f", "both_bad"),
        vote("f", "a", "left"),
    ]
    assert singles(votes) == [
        Single("p", "c", liked=False),
        Single("p", "d", liked=False),
        Single("p", "e", liked=False),
    ]
    assert singles(votes[:1]) == [Single("p", "a", liked=True)]


def answer_all(project: Project, answer: Answer, count: int) -> None:
    for _ in range(count):
        pair = project.next_pair("tab")
        assert pair is not None
        project.vote(pair.id, answer, 1.0)


def test_a_data_set_is_read_as_prepare_reads_it(opened: Opener) -> None:
    project = opened()
    with pytest.raises(UserError, match="vote first"):
        project.write_data()
    answer_all(project, "left", 30)
    path, count = project.write_data(soft=True)
    first = [vote for vote in project.votes.all() if not vote.mirrored]
    assert 20 < count <= len(first)
    rows = [*open_source(path).rows(range(count))]
    for row in rows:
        assert isinstance(row, PairRecord)
        assert row.label == 1.0
        assert row.chosen is not None
        assert row.rejected is not None
        assert row.chosen() != row.rejected()
    assert len(opened().pictures(limit=500)) == 120  # the copies are no pictures to vote on


def test_moved_pictures_are_found_and_lost_ones_left_out(opened: Opener, folder: Path) -> None:
    project = opened()
    answer_all(project, "left", 10)
    votes = decided(project.votes.all())
    chosen = {v.left_sha256: v.left for v in project.votes.all()}
    lost = chosen[votes[0].chosen]
    (folder / lost).unlink()
    _, count = opened().write_data()
    assert count == sum(chosen[one.chosen] != lost for one in votes)


def test_single_pictures_are_written_for_kto(opened: Opener) -> None:
    project = opened()
    answer_all(project, "both_bad", 4)
    path, count = project.write_data(kto=True)
    lines = [json.loads(line) for line in (path / "pairs.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == {False}
    assert len(lines) == count
    assert not open_source(path).paired


@pytest.mark.parametrize("what", ["model", "sampler", "lora"])
def test_the_card_says_what_else_votes_follow(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "p"
    for prompt in range(24):
        for number, value in enumerate(("one", "two")):
            file = folder / f"{prompt}-{number}.png"
            painted(file, prompt * 2 + number, prompt=f"p{prompt}", **{what: value})
    with Project.open(folder) as project:
        list(project.scan())
        assert project.data_card() == []
        while (pair := project.next_pair("tab")) is not None:
            better = [getattr(project.picture(id), what) for id in (pair.left, pair.right)].index("two")
            project.vote(pair.id, ("left", "right")[better], 1)
        (warning,) = project.data_card()
    assert warning.startswith("100% of the chosen and 0% of the rejected images were made with the ")
