"""Blind comparisons: fixed before the first vote, revealed after the last."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from mapo_fast.data.prompt_files import read_prompts
from mapo_fast.data.prompt_text import plain
from mapo_fast.score.manifest import Made, append
from mapo_fast.score.statistics import sign_test, wilson
from mapo_fast.studio.compare import SIDES, Choice, Comparison, comparisons, create
from mapo_fast.util.errors import UserError
from tests.studio.pictures import painted

PROMPTS = [f"--prompt {number}, (fog:1.2)" for number in range(12)]


def made(project: Path, votes: int = 20) -> Comparison:
    models = [["base.safetensors"], ["base.safetensors", "--lora", "it.safetensors:0.8"]]
    found = create(
        project,
        models,
        unvoted=PROMPTS[:8],
        voted=PROMPTS[8:],
        seeds=2,
        votes=votes,
        sampling=["--steps", "9"],
    )
    for at, side in enumerate(SIDES):
        for number, prompt in enumerate(PROMPTS):
            for seed in (0, 1):
                path = painted(found.folder / side / f"{number}-{seed}.png", 100 * at + 2 * number + seed)
                append(path.parent, Made(path, plain(prompt)[0], seed, {}))
    return found


def prefer(one: Comparison, side: str) -> None:
    while (trial := one.next()) is not None:
        one.vote(trial.number, "left" if trial.left.parent.name == side else "right")


def test_the_jobs_are_commands_of_sample(tmp_path: Path) -> None:
    from mapo_fast.cli import app

    one = made(tmp_path)
    sample = get_command(app).commands["sample"]  # type: ignore[attr-defined]
    base, result = (sample.make_context("sample", argv[1:]).params for argv in one.commands())
    assert (base["model"], base["steps"], base["seeds"], base["lora"] or None) == (
        Path("base.safetensors"),
        9,
        2,
        None,
    )
    assert list(result["lora"]) == ["it.safetensors:0.8"]
    assert (base["out"], result["out"]) == (one.folder / "base", one.folder / "result")
    assert [argv[0] for argv in one.commands()] == ["sample", "sample"]
    assert [*read_prompts(base["prompts"]).texts] == [plain(prompt)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(("side", "rate"), [("result", 1.0), ("base", 0.0)])
def test_the_answer_comes_after_the_last_vote(tmp_path: Path, side: str, rate: float) -> None:
    one = made(tmp_path)
    assert one.result() is None
    prefer(one, side)
    answer = Comparison.open(tmp_path, comparisons(tmp_path)[0]).result()
    assert answer is not None
    assert answer.unvoted is not None
    assert answer.voted is not None
    assert answer.unvoted.votes + answer.voted.votes == 20
    assert answer.unvoted.votes >= 12
    assert (answer.unvoted.rate, answer.voted.rate) == (rate, rate)
    n = answer.unvoted.votes
    assert answer.unvoted.interval == wilson(rate, n)
    assert answer.unvoted.p == sign_test(n, 0)
    with pytest.raises(UserError, match="all votes are given"):
        one.undo()


def test_sides_are_mixed_and_the_order_lasts(tmp_path: Path) -> None:
    one = made(tmp_path)
    trials = one.trials()
    assert 3 <= sum(trial.left.parent.name == "base" for trial in trials) <= 17
    assert Comparison(one.folder).trials() == trials
    assert all(trial.left.name == trial.right.name for trial in trials)


def test_votes_are_given_in_order_and_undone(tmp_path: Path) -> None:
    one = made(tmp_path)
    one.vote(0, "tie")
    one.vote(0, "tie")
    with pytest.raises(UserError, match="not the next one"):
        one.vote(0, "left")
    with pytest.raises(UserError, match="not the next one"):
        one.vote(2, "left")
    one.vote(1, "left")
    one.undo()
    one.undo()
    one.undo()
    assert Comparison(one.folder).answers() == []
    one.vote(0, "right")
    assert Comparison(one.folder).answers() == ["right"]
    answer: Choice = "both"  # type: ignore[assignment]
    with pytest.raises(UserError, match="must be one of"):
        one.vote(1, answer)


def test_commands_of_a_project_from_elsewhere_are_not_run(tmp_path: Path) -> None:
    one = made(tmp_path)
    path = one.folder / "comparison.json"
    path.write_text(path.read_text().replace("base.safetensors", "evil.safetensors"))
    with pytest.raises(UserError, match="was made on another machine"):
        Comparison(one.folder).commands()


@pytest.mark.parametrize("votes", [0, 9, 25])
def test_the_number_of_votes_fits(tmp_path: Path, votes: int) -> None:
    with pytest.raises(UserError, match="of 24 pairs of images: take 10 or more"):
        made(tmp_path, votes)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    one = made(tmp_path)
    (one.folder / "result" / "images.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no images\.jsonl"):
        Comparison(one.folder).next()
    with pytest.raises(UserError, match="there is no comparison"):
        Comparison.open(tmp_path, "../x")
