"""Votes: killed anywhere, none is lost or doubled."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from mapo_fast.studio.project import Project
from mapo_fast.studio.votes import FILE, Votes
from tests.studio.conftest import Opener

KILLS = 100


def _voter(project: Project, votes: Votes, told: int) -> None:
    """Votes and undoes until it is killed; tells what the disk has to hold."""
    random.seed()
    project.votes = votes
    while (pair := project.next_pair("tab")) is not None:
        if random.random() < 0.2 and (found := project.votes.all()):
            os.write(told, f"? -{found[-1].pair}\n".encode())
            project.undo("tab")
            os.write(told, f"= -{found[-1].pair}\n".encode())
            continue
        os.write(told, f"? +{pair.id}\n".encode())
        project.vote(pair.id, random.choice(("left", "right", "tie", "both_bad")), 1)
        os.write(told, f"= +{pair.id}\n".encode())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_moments_no_vote_is_lost_or_doubled(opened: Opener, folder: Path) -> None:
    project = opened()
    project.status()
    expected: list[str] = []
    for kill in range(KILLS):
        votes = Votes(folder)
        assert [vote.pair for vote in votes.all()] == expected
        if len(expected) > 100:
            (folder / FILE).unlink()
            expected, votes = [], Votes(folder)
        project.votes = votes
        ours, told = os.pipe()
        child = os.fork()
        if not child:
            os.close(ours)
            _voter(project, votes, told)
            os._exit(0)
        os.close(told)
        rng = random.Random(kill)
        said = b""
        for _ in range(rng.randrange(1, 6)):  # let it vote a few times, then kill it in the middle of one
            said += os.read(ours, 64)
        if rng.random() < 0.7:
            until = rng.random() * 2e-3
            os.sched_yield()
            _spin(until)
        os.kill(child, 9)
        os.waitpid(child, 0)
        while piece := os.read(ours, 4096):
            said += piece
        os.close(ours)
        expected = _after(expected, said.decode().splitlines(), Votes(folder))


def _spin(seconds: float) -> None:
    import time

    time.sleep(seconds)


def _after(before: list[str], said: list[str], found: Votes) -> list[str]:
    """What has to be there: all that was confirmed; what was only begun may be there or not."""
    expected, begun = list(before), ""
    for line in said:
        sign, change = line[0], line[2:]
        if sign == "?":
            begun = change
            continue
        expected, begun = _changed(expected, change), ""
    pairs = [vote.pair for vote in found.all()]
    assert pairs in (expected, _changed(expected, begun))
    return pairs


def _changed(pairs: list[str], change: str) -> list[str]:
    if not change:
        return pairs
    return [*pairs, change[1:]] if change[0] == "+" else [pair for pair in pairs if pair != change[1:]]


def test_lines_that_are_no_votes_are_counted(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"pair": "a"}\n{"pair": 3, "answer": "left"}\nrubbish\n{"undo": "a"}\n')
    votes = Votes(tmp_path)
    assert (len(votes), votes.damaged) == (0, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such permissions there")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(opened: Opener, folder: Path) -> None:
    project = opened()
    pair = project.next_pair("a")
    assert pair is not None
    folder.chmod(0o500)
    try:
        with pytest.raises(Exception, match="Permission denied"):
            project.vote(pair.id, "left", 1)
        assert len(project.votes) == 0
    finally:
        folder.chmod(0o700)
