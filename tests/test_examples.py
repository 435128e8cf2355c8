"""The examples run as they stand, on the tiny SDXL."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from mapo_fast.engine.precision import Precision
from tests.training import make_pairs

EXAMPLES = Path(__file__).parent.parent / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("examples") / "pairs", 12)


def arguments(model: Path, data: Path, out: Path, **others: Any) -> list[str]:
    named = {"model": model, "data": data, "out": out, "resolution": 64, "steps": 2} | others
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


def changes_the_model(model: Path, lora: Path) -> bool:
    """Whether plain diffusers predicts something else with the LoRA than without."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    width = pipe.unet.config.cross_attention_dim
    conditions = {"text_embeds": torch.randn(1, 24), "time_ids": torch.ones(1, 6)}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, width))
    with torch.no_grad():
        before = pipe.unet(*inputs, added_cond_kwargs=conditions).sample
        pipe.load_lora_weights(lora)
        return not torch.equal(before, pipe.unet(*inputs, added_cond_kwargs=conditions).sample)


@pytest.mark.slow
def test_train_from_script(
    tiny_sdxl: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script("train_from_script").main
    assert main(arguments(tiny_sdxl, tmp_path / "no", tmp_path)) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err
    assert main(arguments(tiny_sdxl, pairs, tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"the LoRA is in {tmp_path / 'run' / 'lora'}"
    assert "step 2 of 2: loss " in out
    assert "held-out margin at step 2: " in out
    assert changes_the_model(tiny_sdxl, tmp_path / "run" / "lora")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mapo", "dpo"])
def test_custom_loop_with_kernels(
    objective: str, tiny_sdxl: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("custom_loop_with_kernels")
    losses: list[list[float]] = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda **given: losses.append(train(**given)))
    others = {"objective": objective, "steps": 12, "batch": 4, "lr": 1e-2}
    module.main(arguments(tiny_sdxl, pairs, tmp_path, **others))
    (values,) = losses
    if objective == "dpo":  # at the first step the reference is the model itself
        assert values[0] == pytest.approx(math.log(2), rel=1e-6)
    assert sum(values[-4:]) < sum(values[:4])
    assert changes_the_model(tiny_sdxl, tmp_path)


NOTEBOOK = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))


def cells() -> list[tuple[set[str], str]]:
    """Tags and code of the notebook's code cells."""
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    return [({*cell["metadata"].get("tags", ())}, "".join(cell["source"])) for cell in code]


def test_the_notebook_is_as_colab_wants_it() -> None:
    metadata = NOTEBOOK["metadata"]
    assert (metadata["accelerator"], metadata["colab"]["gpuType"]) == ("GPU", "T4")
    tags = [sorted(tags) for tags, _ in cells()]
    assert tags[:2] == [["install"], ["parameters"]]
    assert not any(tags[2:])
    for _, text in cells()[1:]:  # anything that plain Python cannot run is in the first cell
        compile(text, "notebook", "exec")
    for line in cells()[1][1].splitlines()[1:]:
        assert "  # @param " in line
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])


@pytest.mark.slow
def test_the_notebook_runs_in_fp16_as_on_a_t4(
    tiny_sdxl: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer refuses fp16 on the CPU; here it gets what it chooses on a GPU."""
    from mapo_fast.run import train as module

    in_fp16 = Precision(torch.float16, torch.float32, torch.float16, scaled=True)
    asked: list[str] = []
    monkeypatch.setattr(
        module, "choose_precision", lambda config, _: asked.append(config.train.precision) or in_fp16
    )
    here = {"MODEL": str(tiny_sdxl), "DATA": str(pairs), "OUT": str(tmp_path), "RESOLUTION": 64, "STEPS": 2}
    names: dict[str, Any] = {}
    for tags, text in cells():
        if "install" not in tags:
            exec(compile(text, "notebook", "exec"), names)
        if "parameters" in tags:
            assert {*here} <= {*names}
            names |= here
    assert asked == ["fp16"]
    assert names["result"].finished
    assert names["result"].skipped_steps == 0
    assert len(names["previews"]) == 2
    assert changes_the_model(tiny_sdxl, tmp_path / "run" / "lora")
