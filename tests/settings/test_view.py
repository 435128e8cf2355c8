"""The settings of a run, each with where it comes from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.settings.load import load_config, parse_config, with_settings
from mapo_fast.settings.schema import Config, OptimConfig
from mapo_fast.settings.table import TABLE
from mapo_fast.settings.view import Known, as_json, as_text, known

TOML = """
[model]
path = "m"
[data]
cache = "c"
[train]
output = "o"
steps = 1000
gradient_checkpointing = false
[optim]
lr = 1e-4
"""


def _loaded(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "config.toml").write_text(TOML)
    return load_config(tmp_path / "config.toml", list(overrides))


def _made(**sections: dict[str, Any]) -> Config:
    table = {"model": {"path": "m"}, "data": {"cache": "c"}, "train": {"output": "o"}}
    return parse_config({**table, **sections})


def test_a_setting_comes_from_the_file_the_command_line_or_is_a_default(tmp_path: Path) -> None:
    found = known(_loaded(tmp_path, " optim.lr = 2e-4", "train.seed=0"))
    assert found["optim.lr"] == Known(2e-4, "command line")
    assert found["train.seed"] == Known(0, "command line")  # stated, though it is the default
    assert found["train.steps"] == Known(1000, "file")
    assert found["train.layout"] == Known("joint", "default")  # completed
    assert found["optim.eps"] == Known(1e-8, "default")
    assert found.keys() == {row.name for row in TABLE}


def test_what_a_program_states_is_told_apart(tmp_path: Path) -> None:
    assert set(_made(optim={"lr": 1e-4}).sources.values()) == {"stated"}
    config = _loaded(tmp_path, "train.seed=3")
    for same in (config.model_copy(), pickle.loads(pickle.dumps(config)), with_settings(config, {})):
        assert same.sources == config.sources
    copy = config.model_copy(update={"optim": OptimConfig(lr=1e-4, eps=1e-6)})
    assert (copy.sources["optim.lr"], copy.sources["optim.eps"]) == ("stated", "stated")
    assert (copy.sources["train.seed"], copy.sources["train.steps"]) == ("command line", "file")
    planned = with_settings(config, {"offload.optimizer": "cpu", "train.seed": 4}, "plan")
    assert (planned.sources["offload.optimizer"], planned.sources["train.seed"]) == ("plan", "plan")
    assert planned.sources["train.steps"] == "file"
    assert "offload.optimizer" not in config.sources


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, {"objective.beta": 0.1, "objective.snr": 0.5, "objective.gamma": None, "adapter.alpha": 16.0}),
        ({"objective": {"beta": 0.3}}, {"objective.beta": 0.3, "objective.reference": "auto"}),
        ({"objective": {"name": "dpo"}}, {"objective.beta": 5000.0, "objective.reference": "adapter"}),
        ({"objective": {"name": "dpo"}, "adapter": {"kind": "full"}}, {"objective.reference": "precomputed"}),
        ({"adapter": {"kind": "full"}}, {"adapter.alpha": None}),
        ({"adapter": {"rank": 4, "alpha": 8.0}}, {"adapter.alpha": 8.0}),
    ],
    ids=str,
)
def test_values_are_those_that_run(sections: dict[str, Any], expected: dict[str, Any]) -> None:
    found = known(_made(**sections))
    assert {name: found[name].value for name in expected} == expected


def test_one_object_for_programs() -> None:
    found = as_json(known(_made(preview={"prompts": ["a"]}), ["train.layout"]))
    assert found["train.output"] == {"value": "o", "from": "stated"}
    assert found["preview.prompts"] == {"value": ["a"], "from": "stated"}
    assert found["train.layout"] == {"value": None, "from": "plan"}


def test_lines_by_section_in_which_defaults_stand_back() -> None:
    lines = list(as_text(known(_made(optim={"lr": 2e-4}), ["train.layout"])))
    assert [text for text, style in lines if style == "bold"] == [f"[{name}]" for name in Config.model_fields]
    assert len(lines) == len(TABLE) + 2 * len(Config.model_fields) - 1
    styles = {tuple(text.split()): style for text, style in lines}
    assert styles["lr", "0.0002", "stated"] == ""
    assert styles["eps", "1e-08", "default"] == "dim"
    assert styles["vram", "(unset)", "default"] == "dim"
    assert styles["layout", "chosen", "when", "the", "run", "starts", "plan"] == ""
