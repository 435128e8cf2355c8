"""A project: pictures, votes and the next pair."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from mapo_fast.studio.answers import Answer
from mapo_fast.studio.project import Project
from mapo_fast.util.errors import UserError
from tests.studio.conftest import Opener
from tests.studio.pictures import painted


def vote_all(project: Project, most: int = 10_000) -> list[tuple[int, int]]:
    """Vote until nothing is left; returns the pictures of the pairs without their order."""
    shown = []
    while len(shown) < most and (pair := project.next_pair("tab")) is not None:
        project.vote(pair.id, "left", 1.0)
        shown.append((min(pair.left, pair.right), max(pair.left, pair.right)))
    return shown


def test_no_pair_comes_twice_but_for_mirrored_repeats(opened: Opener) -> None:
    project = opened()
    shown = vote_all(project)
    status = project.status()
    assert (status.prompts, status.kept, status.votes) == (30, 10, len(shown))
    assert len({*shown}) == 20 * 6
    repeated = len(shown) - len({*shown})
    assert 0 < repeated <= 20
    assert (status.same, status.repeated) == (0, repeated)  # always «left», so each repeat disagrees
    kept = {*project.kept()}
    assert not kept & {vote.prompt for vote in project.votes.all()}
    again = opened()
    assert len(again.votes) == len(shown)
    assert {*again.kept()} == kept
    assert {*vote_all(again)} <= {*shown}


def test_sides_are_random_and_written_down(opened: Opener) -> None:
    project = opened()
    vote_all(project, 60)
    firsts = [vote.left < vote.right for vote in project.votes.all()]
    assert 10 < sum(firsts) < 50


def test_the_pairs_ahead_become_the_next_ones_and_tabs_share_none(opened: Opener) -> None:
    project = opened()
    first, second = project.next_pairs("a")
    assert project.next_pairs("a") == [first, second]
    others = project.next_pairs("b")
    assert not {first.id, second.id} & {pair.id for pair in others}
    project.vote(first.id, "tie", 1)
    assert project.next_pair("a") == second


def test_a_vote_sent_twice_counts_once_and_an_undo_brings_the_pair_back(opened: Opener) -> None:
    project = opened()
    pair = project.next_pair("a")
    assert pair is not None
    assert project.vote(pair.id, "right", 2.5)
    assert not project.vote(pair.id, "right", 2.5)
    with pytest.raises(UserError, match="undo it first"):
        project.vote(pair.id, "left", 1)
    with pytest.raises(UserError, match="not open any more"):
        project.vote("0" * 24, "left", 1)
    assert project.undo("a") == pair == project.next_pair("a")
    assert project.status().votes == 0
    assert project.undo("a") is None
    assert project.vote(pair.id, "left", 1)
    again = opened()
    assert [vote.answer for vote in again.votes.all()] == ["left"]


@pytest.mark.parametrize("answer", ["", "both", "LEFT"])
def test_an_unknown_answer_is_refused(opened: Opener, answer: Answer) -> None:
    project = opened()
    pair = project.next_pair("a")
    assert pair is not None
    with pytest.raises(UserError, match="must be one of"):
        project.vote(pair.id, answer, 1)
    assert len(project.votes) == 0


def test_a_second_studio_is_told_who_has_the_project(opened: Opener, folder: Path) -> None:
    opened()
    with pytest.raises(UserError, match=r"is open in another studio \(process \d+ on '"):
        Project.open(folder)


def test_typed_prompts_last(folder: Path, opened: Opener) -> None:
    for number in range(2):
        painted(folder / "new" / f"{number}.png", 900 + number)
    project = opened()
    unknown = project.unknown()
    assert [picture.path for picture in unknown] == ["new/0.png", "new/1.png"]
    assert all("holds no prompt" in picture.why for picture in unknown)
    project.set_prompt([picture.id for picture in unknown], "typed ünïcode")
    assert project.groups()[-1][1:3] == ("typed ünïcode", 2)
    assert not project.unknown()
    for file in project.index.rows("select path from pictures where path like 'new/%'"):
        (folder / file[0]).touch()
    project = opened()
    assert "typed ünïcode" in [group.prompt for group in project.groups()]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    with Project.open(folder) as project:
        list(project.scan())
        assert "there is no picture yet" in project.status().missing
    for number in range(30):
        painted(folder / f"{number}.png", number, prompt=f"p{number}")
    with Project.open(folder) as project:
        list(project.scan())
        assert project.status().missing.startswith("each of the 30 prompts has one picture")
        assert project.next_pair("a") is None


def test_a_project_without_its_index_or_with_a_damaged_one_is_the_same(
    opened: Opener, cache: Path, folder: Path
) -> None:
    project = opened()
    shown = {*vote_all(project, 50)}
    paths = {picture.id: picture.path for picture in project.pictures(limit=1000)}
    named = {tuple(sorted((paths[a], paths[b]))) for a, b in shown}
    project.close()
    (index,) = cache.rglob("index.sqlite")
    index.write_bytes(b"no database" * 1000)
    project = opened()
    paths = {picture.id: picture.path for picture in project.pictures(limit=1000)}
    new = {tuple(sorted((paths[a], paths[b]))) for a, b in vote_all(project)}
    repeats = {vote.key for vote in project.votes.all() if vote.mirrored}
    assert len(named | new) == 120
    assert len(named & new) <= len(repeats)


@pytest.mark.slow
def test_nothing_heavy_is_imported(opened: Opener) -> None:
    import subprocess

    code = (
        "import sys, importlib, pkgutil, mapo_fast.studio\n"
        "for module in pkgutil.iter_modules(mapo_fast.studio.__path__, 'mapo_fast.studio.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pages_of_pictures_follow_each_other(opened: Opener) -> None:
    project = opened()
    found = project.pictures(limit=50)
    found += project.pictures(after=found[-1].id, limit=100)
    assert len(found) == 120
    assert all(a.id < b.id for a, b in pairwise(found))
    group = random.Random(0).choice(project.groups())
    assert {picture.prompt for picture in project.pictures(group=group.id)} == {group.prompt}
