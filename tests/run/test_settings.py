"""The settings of a run are final before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_fast.engine.processes import Processes
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.settings import final_settings, look
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import planned
from mapo_fast.settings.view import Known
from mapo_fast.util.errors import UserError
from tests.files_of_models import edit_file, make_file
from tests.training import make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLANNED = planned("exact").keys()

pytestmark = pytest.mark.usefixtures("planned_here")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _no_model() -> Pipeline:
    pytest.fail("the model folder is opened")


def _config(model: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    return make_config(model, folder / "cache", folder / "run", **sections)


def test_the_device_decides_what_is_left_open(tmp_path: Path) -> None:
    config = _config(tmp_path, tmp_path, speed={"prefetch": True})
    final, budget = final_settings(config, CPU, model=_no_model)
    assert budget is None
    assert (final.speed.fused_ops, final.speed.prefetch, final.train.device) == (False, True, "cpu")
    assert final.sources["speed.fused_ops"] == final.sources["train.device"] == "device"
    assert final.sources["speed.prefetch"] == "stated"
    assert final.stated - config.stated == {"speed.fused_ops", "train.device"}
    sharded = _config(tmp_path, tmp_path, train={"shard": True}, optim={"name": "adamw"})
    final, budget = final_settings(sharded, CUDA, Processes(0, 2), model=_no_model)
    assert (budget, final.speed.fused_ops, final.train.device) == (None, True, "cuda")
    assert final.sources["train.fused_step"] == "device"


def test_the_plan_and_the_resumed_run_decide_the_rest(tiny_sdxl: Path, tmp_path: Path) -> None:
    config = _config(tiny_sdxl, tmp_path, train={"vram": "1GiB", "layout": "split"})
    final, budget = final_settings(config, CPU, model=lambda: open_sdxl(tiny_sdxl))
    assert budget is not None
    assert {name for name, source in final.sources.items() if source == "plan"} == PLANNED - {"train.layout"}
    assert final.sources["train.layout"] == "stated"
    assert not final.train.fused_step
    recorded = final.model_dump(mode="json")
    recorded["train"]["fused_step"] = True
    final, _ = final_settings(config, CPU, model=lambda: open_sdxl(tiny_sdxl), recorded=recorded)
    assert final.train.fused_step
    assert final.sources["train.fused_step"] == "resumed run"
    assert final.sources["offload.optimizer"] == "plan"


def test_a_look_has_the_settings_that_a_run_will_have(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "load_unet", lambda *_: pytest.fail("weights are loaded"))
    config = _config(tiny_sdxl, tmp_path, train={"vram": "1GiB"})
    final, _ = final_settings(config, CPU, model=lambda: open_sdxl(tiny_sdxl))
    seen = look(config)
    assert (seen.unplanned, seen.refused) == ("", None)
    assert seen.settings["train.layout"] == Known(final.train.layout, "plan")
    assert {
        name: source for name, (_, source) in seen.settings.items() if source not in ("default", "model")
    } == final.sources
    assert not list(tmp_path.iterdir())


def test_a_look_says_what_auto_stands_for(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = make_file(tiny_sdxl, tmp_path / "v.safetensors", dtype=torch.bfloat16)
    edit_file(file, lambda tensors: tensors.update(v_pred=torch.empty(0), ztsnr=torch.empty(0)))
    names = ("train.prediction", "train.zero_terminal_snr", "export.dtype")

    def said(model: Path, **sections: dict[str, Any]) -> list[Known]:
        sections = {"train": {"device": "cpu"}, "adapter": {"kind": "full"}, **sections}
        return [look(_config(model, tmp_path, **sections)).settings[name] for name in names]

    assert said(file) == [Known("v_prediction", "model"), Known("on", "model"), Known("bf16", "model")]
    assert said(tiny_sdxl) == [Known("epsilon", "model"), Known("off", "model"), Known("fp16", "model")]
    stated = said(file, export={"dtype": "fp32"}, adapter={"kind": "lora"})
    assert stated[2] == Known("fp32", "stated")
    edit_file(
        file, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items() if "first" in k})
    )
    assert said(file)[2] == Known("auto", "default")  # each part keeps its own type
    assert said(tmp_path / "none")[0] == Known("auto", "default")


def test_what_is_not_known_yet_is_left_to_the_start(tiny_sdxl: Path, tmp_path: Path) -> None:
    without_model = _config(tmp_path / "none", tmp_path, train={"vram": "1GiB", "layout": "split"})
    seen = look(without_model)
    assert "model not found" in seen.unplanned
    assert {name for name, one in seen.settings.items() if one == (None, "plan")} == PLANNED - {
        "train.layout"
    }
    assert seen.settings["speed.fused_ops"] == Known(False, "device")
    seen = look(_config(tiny_sdxl, tmp_path, train={"device": "cuda"}))
    assert "torch sees no NVIDIA GPU" in seen.unplanned
    assert {name for name, one in seen.settings.items() if one == (None, "plan")} == PLANNED
    assert seen.settings["speed.fused_ops"] == Known(True, "default")
    seen = look(_config(tmp_path / "none", tmp_path, train={"device": "cpu"}))  # nothing to plan
    assert (seen.unplanned, seen.refused) == ("", None)
    assert seen.settings["train.layout"] == Known("split", "default")


def test_a_look_says_what_a_run_would_be_refused_for(tiny_sdxl: Path, tmp_path: Path) -> None:
    config = _config(tiny_sdxl, tmp_path, train={"vram": "560MiB"})
    seen = look(config)
    assert seen.settings["train.layout"] == Known(None, "plan")
    with pytest.raises(UserError) as refused:
        final_settings(config, CPU, model=lambda: open_sdxl(tiny_sdxl))
    assert str(seen.refused) == str(refused.value)
    assert "no plan fits train.vram" in str(seen.refused)
