"""`settings.json` of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.run.starts import keep_settings
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config


def _config(output: Path, **train: Any) -> Config:
    return parse_config(
        {"model": {"path": "m"}, "data": {"cache": "c"}, "train": {"output": str(output), **train}}
    )


def _starts(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "settings.json").read_text())["starts"]
    return found


def test_each_start_with_other_settings_is_kept(tmp_path: Path) -> None:
    assert keep_settings(_config(tmp_path, steps=5), "r", step=0, processes=1) == []
    (first,) = _starts(tmp_path)
    assert (first["step"], first["processes"]) == (0, 1)
    assert first["settings"]["train.steps"] == {"value": 5, "from": "stated"}
    assert first["settings"]["train.seed"] == {"value": 0, "from": "default"}
    keep_settings(_config(tmp_path, steps=5), "r", step=3, processes=1)
    assert _starts(tmp_path) == [first]
    assert keep_settings(_config(tmp_path, steps=9), "r", step=5, processes=1) == []
    keep_settings(_config(tmp_path, steps=9), "r", step=6, processes=2)
    starts = _starts(tmp_path)
    assert starts[0] == first
    assert [(start["step"], start["processes"]) for start in starts] == [(0, 1), (5, 1), (6, 2)]
    assert [start["settings"]["train.steps"]["value"] for start in starts] == [5, 9, 9]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "edited": lambda path: path.write_text(path.read_text().replace('"step": 0', '"step": 1')),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "another kind": lambda path: path.write_text("[]"),
    "nested too deeply": lambda path: path.write_text('{"starts": ' + "[" * 10**5),
    "no checksum": lambda path: path.write_text("{}"),
    "another run's": lambda path: (
        path.unlink(),
        keep_settings(_config(path.parent), "s", step=0, processes=1),
    ),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_moved_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "settings.json"
    keep_settings(_config(tmp_path), "r", step=0, processes=1)
    DAMAGES[damage](path)
    before = path.readlink() if path.is_symlink() else path.read_bytes()
    aside = tmp_path / "unreadable-settings.json"
    (note,) = keep_settings(_config(tmp_path), "r", step=4, processes=1)
    assert str(path) in note
    assert note.endswith("it is now unreadable-settings.json, and a new settings.json is begun")
    assert (aside.readlink() if aside.is_symlink() else aside.read_bytes()) == before
    assert [start["step"] for start in _starts(tmp_path)] == [4]
