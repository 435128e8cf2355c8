"""Presets: the recipes by name, complete but for model and data, and where a run goes by default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mapo_fast.settings.load import load_config
from mapo_fast.settings.presets import FOLDER, PRESETS, preset_table, preset_text
from mapo_fast.util.errors import UserError
from mapo_kernels.objectives import objective_names

ROOT = Path(__file__).parents[2]
NAMED = ["model.path=Base.safetensors", "data.source=my pairs/"]


def test_the_recipes_are_the_presets() -> None:
    assert {path.name for path in (ROOT / "recipes").iterdir()} == {f"{name}.toml" for name in PRESETS}
    assert FOLDER == ROOT / "recipes"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_labelled_and_name_no_paths(name: str) -> None:
    config = load_config(None, NAMED, preset=name)
    for objective in objective_names():
        load_config(None, [*NAMED, f"objective.name={objective}"], preset=name)
    assert "NOT YET RUN ON SDXL" in preset_text(name)
    assert f"--preset {name} " in preset_text(name)
    table = preset_table(name)
    assert "model" not in table
    assert not {"source", "cache", "output"} & {*table["data"], *table["train"]}
    assert config.sources["optim.lr"] == "preset"
    assert config.sources["data.source"] == "command line"


def test_a_small_lora_is_a_lora_with_another_base() -> None:
    lora, small = preset_table("lora"), preset_table("lora-small")
    assert small.pop("adapter") == lora.pop("adapter") | {"base": "int8"}
    assert small == lora


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--preset lroa: .*there are lora, lora-small, full, dpo-lora, kto"):
        load_config(None, NAMED, preset="lroa")


def test_a_file_and_overrides_replace_what_a_preset_states(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("optim.lr = 1e-6\ntrain.output = 'run'\nspeed.compile = true\n")
    config = load_config(file, [*NAMED, "adapter.rank=4"], preset="lora")
    assert (config.optim.lr, config.optim.warmup_steps, config.adapter.rank) == (1e-6, 20, 4)
    assert config.train.output == tmp_path / "run"
    found = {name: config.sources[name] for name in ("optim.lr", "optim.warmup_steps", "adapter.rank")}
    assert found == {"optim.lr": "file", "optim.warmup_steps": "preset", "adapter.rank": "command line"}


def test_a_run_and_its_cache_are_named_after_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, NAMED, preset="lora")
    assert config.train.output == Path("runs/Base-my_pairs")
    assert config.data.cache == Path("runs/cache/Base-my_pairs")
    assert config.sources["train.output"] == config.sources["data.cache"] == "default"
    config = load_config(None, [*NAMED, "train.output=elsewhere/one"], preset="lora")
    assert config.data.cache == Path("elsewhere/cache/Base-my_pairs")
    config = load_config(None, ["model.path=a/Über_1.5/", "data.source=."], preset="lora")
    assert config.train.output == Path(f"runs/Über_1.5-{tmp_path.name}")
    with pytest.raises(UserError, match=r"--preset lora: which model\? Name it with --model FILE"):
        load_config(None, ["data.source=pairs"], preset="lora")


@pytest.mark.slow
def test_a_wheel_holds_the_presets(tmp_path: Path) -> None:
    """Built as pip does, but with nothing written into the checkout."""
    build = ["setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path]
    done = subprocess.run([sys.executable, *build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "from mapo_fast.settings.presets import *; print(FOLDER, *map(preset_text, PRESETS))"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.stdout.startswith(str(tmp_path / "mapo_fast" / "recipes")), done.stderr
    assert done.stdout.count("NOT YET RUN ON SDXL") == len(PRESETS)
