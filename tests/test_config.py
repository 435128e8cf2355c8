"""Settings: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_fast.config import load_config
from mapo_fast.errors import UserError

MINIMAL = """
[model]
path = "base"
[data]
cache = "cache"
[train]
output = "run"
"""


def _write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_in_the_file_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path))
    assert config.model.path == tmp_path / "base"
    assert config.data.cache == tmp_path / "cache"
    assert config.train.output == tmp_path / "run"
    assert config.data.source is None


def test_overrides_replace_values_with_toml_types(tmp_path: Path) -> None:
    config = load_config(
        _write(tmp_path),
        ["optim.lr=1e-6", "objective.name=sft", "data.flip=true", "adapter.targets=['to_q']", "model.path=x"],
    )
    assert config.optim.lr == 1e-6
    assert config.objective.name == "sft"
    assert config.data.flip is True
    assert config.adapter.targets == ("to_q",)
    assert config.model.path == Path("x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", r"unknown key train\.stps \(did you mean train\.steps\?\)"),
        ("optimizer.lr=1", r"unknown key optimizer \(did you mean optim\?\)"),
        ("optim.zzzzzz=1", r"unknown key optim\.zzzzzz \(valid: name, lr"),
        ("optim.lr='fast'", r"optim\.lr = 'fast'"),
        ("optim.lr=-1", r"optim\.lr = -1.*greater than 0"),
        ("train.steps=0", r"train\.steps = 0"),
        ("train.layout='both'", r"train\.layout = 'both'.*'joint' or 'split'"),
        ("data.max_tokens=100", r"data\.max_tokens = 100.*77, 150 or 225"),
        ("data.resolution=1020", r"data\.resolution = 1020.*multiple of 8"),
        ("optim.betas=[0.9, 1.0]", r"betas must both be in \[0, 1\)"),
        ("train.gradient_checkpointing=false", r"needs train\.gradient_checkpointing = true"),
        ("train", "write it as section.key=value"),
        ("a.b.c=1", "write it as section.key=value"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(_write(tmp_path), [override])
    assert "\n" not in str(caught.value)


def test_fp16_is_for_lora_only(tmp_path: Path) -> None:
    assert load_config(_write(tmp_path), ["train.precision=fp16"]).adapter.kind == "lora"
    with pytest.raises(UserError, match=r"fp16.*lora.*only"):
        load_config(_write(tmp_path), ["train.precision=fp16", "adapter.kind=full"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "not valid TOML"),
        ("[model]\npath = 'x'\n[train]\noutput = 'y'\n", "data is missing"),
        ("[model]\npath = 3\n[data]\ncache='c'\n[train]\noutput = 'y'\n", r"model\.path = 3"),
        ("model = 1\n", "model = 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(_write(tmp_path, text))


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not found: .*nothing\.toml"):
        load_config(tmp_path / "nothing.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.toml"):
        load_config(tmp_path / "b.toml")


@pytest.mark.parametrize("name", ["lora_300_pairs", "full_24gb"])
def test_recipes_are_valid_and_labelled(name: str) -> None:
    path = Path(__file__).parent.parent / "recipes" / f"{name}.toml"
    load_config(path)
    assert "NOT YET RUN ON SDXL" in path.read_text(encoding="utf-8")
