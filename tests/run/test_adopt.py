"""A run of format 1, whose files do not say what they are, goes on once and says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.engine import reference
from mapo_fast.run.adopt import adopt
from mapo_fast.run.log import read_log
from mapo_fast.run.train import fit
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError
from tests.training import make_cache, make_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Config of a run that has ended: six steps of DPO, two files of reference errors."""
    folder = tmp_path_factory.mktemp("whole")
    cache = make_cache(tiny_sdxl, folder / "data")
    config = make_config(tiny_sdxl, cache, folder / "run", objective={"name": "dpo"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PART", 4)
        fit(config)
    return config


@pytest.fixture
def config(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The folder of the same run in format 1, after four steps."""
    monkeypatch.setattr(reference, "PART", 4)
    shutil.copytree(whole.train.output, tmp_path / "run")
    as_format_1(tmp_path / "run")
    return whole.model_copy(update={"train": whole.train.model_copy(update={"output": tmp_path / "run"})})


def as_format_1(output: Path) -> None:
    """Take out of a run's files what format 1 had not, and its last two steps."""
    shutil.rmtree(output / "unet")
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    record = json.loads((output / "run.json").read_text())
    depends = record["identity"] | {"base": record["config"]["adapter"]["base"]}
    for name in ("seed", "pairs_per_batch", "precision", "caption_dropout"):
        depends[name] = record["config"]["train"][name]
    identity = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    run = record["run"]
    for name in ("format", "run", "sha256"):
        del record[name]
    (output / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in (output / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        text = json.dumps(state["state"])
        hashes = state["files"] | {"state": hashlib.sha256(text.encode()).hexdigest()}
        old = {"format": 1, "step": state["step"], "sha256": hashes, "state": text}
        (path / "state.json").write_text(json.dumps(old, indent=1) + "\n")
        (path / "README.txt").unlink()
    log = output / "log.jsonl"
    log.write_text(log.read_text().replace(f'"run": "{run}", ', ""))
    save_file(load_file(output / "held_out_start.safetensors"), output / "held_out_start.safetensors")
    for path in (output / "reference").iterdir():
        errors = load_file(path)["errors"]
        digest = hashlib.sha256(errors.numpy().tobytes()).hexdigest()
        save_file({"errors": errors}, path, {"identity": identity, "sha256": digest})


def warnings(output: Path) -> list[str]:
    return [e["message"] for e in read_log(output / "log.jsonl") if e["event"] == "warning"]


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_is_then_checked(
    config: Config, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = config.train.output
    expected = load_file(whole.train.output / UNET)
    monkeypatch.setattr(
        "mapo_fast.run.evaluate.HeldOut.errors", None
    )  # nothing is measured or computed again
    monkeypatch.setattr("mapo_fast.engine.engine.Engine.errors_of", None)
    monkeypatch.setattr("mapo_fast.run.looks.Looks.take", lambda *_, **__: None)
    assert fit(config, resume=True).finished
    found = load_file(output / UNET)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sum("taken over as they are, this once" in text for text in warnings(output)) == 1
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert fit(config, resume=True).finished
    assert not any("taken over" in text for text in warnings(output)[-1:])


@pytest.mark.slow
def test_what_was_renamed_before_is_not_used_until_it_is_named_right(config: Config) -> None:
    output = config.train.output
    checkpoints = output / "checkpoints"
    (checkpoints / "step-00000004").rename(checkpoints / "step-00000005")
    with pytest.raises(UserError, match=r"step-00000005: it is that of step 4: name it step-00000004 again"):
        fit(config, resume=True)
    (checkpoints / "step-00000005").rename(checkpoints / "step-00000004")
    assert fit(config, resume=True).finished


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a flipped bit", "wrong types"])
def test_what_was_damaged_before_is_not_taken_over(config: Config, damage: str) -> None:
    output = config.train.output
    path = output / "checkpoints" / "step-00000004" / "state.json"
    state = json.loads(path.read_text())
    if damage == "wrong types":
        state["sha256"] = {"state": 5, "model.safetensors": None}
    else:
        state["state"] = state["state"].replace("0", "1", 1)
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used \(step-00000004: format 1"):
        fit(config, resume=True)


@pytest.mark.slow
def test_what_this_version_computes_otherwise_is_said(config: Config) -> None:
    changed = {"precision": "pure_bf16", "accumulation": 2}
    other = config.model_copy(update={"train": config.train.model_copy(update=changed)})
    record = json.loads((config.train.output / "run.json").read_text())
    store = CheckpointStore(config.train.output / "checkpoints", 3)
    notes = adopt(other, record["identity"], store)
    assert "adds the gradients of micro-batches with stochastic rounding" in notes[-1]
