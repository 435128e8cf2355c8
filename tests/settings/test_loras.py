"""LoRA files with weights: as people write them, in a config and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_fast.settings.load import load_config
from mapo_fast.settings.loras import Lora, parse_lora
from mapo_fast.util.errors import UserError

CONFIG = """
[model]
path = "model"
lora = ["a.safetensors", "sub/b.safetensors=0.5"]
[data]
cache = "cache"
[train]
output = "out"
steps = 1
"""


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors=0.8", "a.safetensors", 0.8),
        ("a.safetensors=-1", "a.safetensors", -1.0),
        ("x=y.safetensors=2", "x=y.safetensors", 2.0),
        ("here=0.5", "here=0.5", 1.0),
    ],
)
def test_what_exists_is_a_path(tmp_path: Path, text: str, path: str, weight: float) -> None:
    (tmp_path / "here=0.5").touch()
    found = parse_lora("--lora", text, tmp_path)
    assert found == Lora(tmp_path / path, weight)
    assert parse_lora("--lora", str(found)) == found, "read again as it is written"


@pytest.mark.parametrize("text", ["a=b", "a=", "a=nan", "a=inf", "", "=1"])
def test_what_is_no_weight_is_named(text: str) -> None:
    with pytest.raises(UserError, match="--lora"):
        parse_lora("--lora", text)


def test_paths_in_a_config_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    config = load_config(tmp_path / "c.toml")
    found = [parse_lora("model.lora", text) for text in config.model.lora]
    assert found == [Lora(tmp_path / "a.safetensors", 1.0), Lora(tmp_path / "sub" / "b.safetensors", 0.5)]
    other = load_config(tmp_path / "c.toml", ['model.lora=["there.safetensors=2"]'])
    assert [parse_lora("model.lora", text) for text in other.model.lora] == [
        Lora(Path("there.safetensors"), 2.0)
    ]
    assert other.sources["model.lora"] == "command line"
