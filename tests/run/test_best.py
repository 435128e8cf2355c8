"""The best step: the rule on made-up errors, and what runs keep by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mapo_fast.cli import app
from mapo_fast.models.sampling import Sampling
from mapo_fast.run.best import FEWEST, Best, Verdict, judge
from mapo_fast.run.evaluate import HeldOutErrors
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.score.sample import open_for_sampling, sample
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.students_t import half_width
from tests.training import make_cache, make_config

START = HeldOutErrors(torch.full((20, 8), 0.5), torch.full((20, 8), 0.4), [])
"""No pair is ranked right."""
PROMPTS = torch.arange(20) // 2
"""Two pairs of each of ten prompts."""


def moved(chosen: float, spread: float, right: int, margin: float = 0.2) -> HeldOutErrors:
    """Errors with this mean rise of the chosen error, and its deviation over prompts.

    The first `right` of eight draws of every pair are ranked right, by `margin`.
    """
    each = torch.linspace(-1, 1, 10, dtype=torch.float64)
    now = START.chosen + (chosen + spread * each / each.std())[PROMPTS][:, None]
    return START._replace(chosen=now, rejected=torch.where(torch.arange(8) < right, now + margin, now - 0.1))


def test_the_interval_is_over_prompts_and_a_share_of_the_starts_error() -> None:
    verdict = judge(moved(0.01, 0.02, 4), START, PROMPTS, 0.1)
    half = half_width(0.95, 9) * 0.02 / math.sqrt(10) / 0.5
    assert verdict.accuracy.tolist() == [0.5] * 10
    assert verdict.rise.mean == pytest.approx(0.02)
    assert verdict.rise.high == pytest.approx(0.02 + half)
    bound = 0.02 + half
    assert judge(moved(0.01, 0.02, 4), START, PROMPTS, bound + 1e-6).allowed
    assert not judge(moved(0.01, 0.02, 4), START, PROMPTS, bound - 1e-6).allowed


def test_fewest_prompts_are_those_at_which_the_interval_is_narrower_than_the_spread() -> None:
    assert half_width(0.95, FEWEST - 1) / math.sqrt(FEWEST) < 1
    assert half_width(0.95, FEWEST - 2) / math.sqrt(FEWEST - 1) > 1
    assert FEWEST == 7  # as the settings say


def best(patience: int = 0) -> Best:
    """The rule at work, with a tolerance of 0.1, without a run."""
    made = Best.__new__(Best)
    made.config = make_config(
        Path("m"), Path("c"), Path("o"), train={"patience": patience, "best_tolerance": 0.1}
    )
    made.prompts, made.on = PROMPTS, True
    made.restore({})
    return made


def test_a_step_is_the_best_only_if_its_gain_is_certain_and_does_no_harm() -> None:
    one = best(patience=3)
    evaluations = {
        10: (moved(-0.01, 0.01, 0), False),  # no gain
        20: (moved(0.0, 0.01, 3), True),
        30: (moved(0.0, 0.3, 8), False),  # its error is too uncertain
        40: (moved(0.06, 0.01, 8), False),  # its error has risen
        50: (moved(0.01, 0.01, 6), True),
        60: (some(7), False),  # better on two of ten prompts
        70: (moved(0.01, 0.01, 6, margin=0.9), False),
        80: (moved(math.nan, 0.01, 8), False),
    }
    for step, (errors, better) in evaluations.items():
        assert not one.exhausted
        before = json.loads(json.dumps(one.state()))
        assert (one.take(step, errors, START) is not None) == better, step
        again = best(patience=3)  # as a resumed run has it
        again.restore(before)
        again.take(step, errors, START)
        assert again.state() == one.state()
    assert one.step == 50
    assert one.exhausted
    assert "step 50 stays the best one" in one.ending


def some(right: int) -> HeldOutErrors:
    """Six draws ranked right, and `right` on the first two prompts."""
    base, more = moved(0.0, 0.01, 6), moved(0.0, 0.01, right)
    return base._replace(rejected=torch.where(PROMPTS[:, None] < 2, more.rejected, base.rejected))


@pytest.fixture(scope="module")
def make(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    cache = make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"), held_out=0.4)

    def build(output: Path, **train: Any) -> Config:
        train = {"evaluate_pairs": 9, "evaluate_every": 1, "best_tolerance": 1.0, **train}
        return make_config(
            tiny_sdxl,
            cache,
            output,
            train=train,
            data={"held_out": 0.4},
            optim={"lr": 3e-3, "warmup_steps": 0},
            adapter={"kind": "lora", "rank": 4},
        )

    return build


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any gain for a certain one: of ten pairs and a few steps there is none."""
    monkeypatch.setattr(Verdict, "beats", lambda self, other: bool(self.accuracy.mean() > other.mean()))


def kept(run: Path) -> tuple[str, dict[str, torch.Tensor]]:
    [folder] = (run / "best").iterdir()
    return folder.name, load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("certain")
def test_a_run_keeps_its_best_step_and_a_resumed_one_the_same(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    whole = fit(make(tmp_path / "whole", steps=8))
    assert whole.best_step is not None
    name, tensors = kept(tmp_path / "whole")
    assert name == f"step-{whole.best_step:08d}"
    readme = tmp_path / "whole" / "best" / name / "README.txt"
    assert "it ranks more held-out pairs right" in readme.read_text()
    evaluations = [e for e in read_log(tmp_path / "whole" / "log.jsonl") if e["event"] == "evaluation"]
    [chosen] = [e for e in evaluations if e["step"] == whole.best_step]
    assert chosen["accuracy"] == max(e["accuracy"] for e in evaluations)
    saved = [path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()]
    assert len(saved) == 2  # the best step does not count

    for steps in (4, 8):
        parted = fit(make(tmp_path / "parted", steps=steps), resume=steps > 4)
    assert parted.best_step == whole.best_step
    other, same = kept(tmp_path / "parted")
    assert other == name
    assert all(torch.equal(value, same[key]) for key, value in tensors.items())


@pytest.mark.slow
@pytest.mark.usefixtures("certain")
def test_the_best_step_is_exported_and_sampled(make: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = fit(make(run, steps=4))
    name, tensors = kept(run)
    exported = CliRunner().invoke(
        app, ["export", str(run), "--best", "--to", "peft", "--out", str(tmp_path / "peft")]
    )
    assert exported.exit_code == 0, exported.output
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sorted(float(v.double().sum()) for v in written.values()) == sorted(
        float(v.double().sum()) for v in tensors.values()
    )
    how = Sampling(steps=1, width=32, height=32)
    assert sample(open_for_sampling(run / "best"), ["red"], [0], how, tmp_path / "images") == 1
    assert result.best_step == int(name.removeprefix("step-"))


@pytest.mark.slow
@pytest.mark.usefixtures("certain")
def test_a_run_ends_where_nothing_better_comes(make: Callable[..., Config], tmp_path: Path) -> None:
    config = make(tmp_path / "run", patience=3, steps=60, checkpoint_every=50)
    result = fit(config)
    assert result.finished
    assert result.best_step is not None
    assert result.step == result.best_step + 3
    *_, said = [e["message"] for e in read_log(result.log) if e["event"] == "warning"]
    assert said.startswith("the run ends here: 3 evaluations without a better step")
    assert (tmp_path / "run" / "checkpoints" / f"step-{result.step:08d}").is_dir()
    assert (tmp_path / "run" / "lora" / "lora_kohya.safetensors").is_file()
    assert fit(config, resume=True) == result


@pytest.mark.slow
def test_without_enough_prompts_it_is_off_and_says_so(
    make: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    result = fit(make(tmp_path / "few", evaluate_pairs=6, steps=1))
    assert result.best_step is None
    assert not (tmp_path / "few" / "best").exists()
    [said] = [e["message"] for e in read_log(result.log) if e["event"] == "warning"]
    assert said.startswith("no best step is kept: 6 prompts are held out, and below 7")
    assert "mapo-fast evaluate --blind" in said
    exported = CliRunner().invoke(
        app, ["export", str(tmp_path / "few"), "--best", "--to", "peft", "--out", str(tmp_path / "peft")]
    )
    assert isinstance(exported.exception, UserError)
    assert "has no best step (train.best)" in str(exported.exception)
