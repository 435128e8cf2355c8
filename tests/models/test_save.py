"""Models written as files and folders come back bit by bit, and diffusers reads them offline."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mapo_fast.models import save
from mapo_fast.models.identity import encoders_identity, unet_identity
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.save import save_folder, save_single_file
from mapo_fast.models.single_file import metadata
from mapo_fast.util.errors import MachineError, UserError
from tests.files_of_models import edit_file, make_file
from tests.tiny import make_tiny_sdxl

KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]


def weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        for name, tensor in load_file(file).items():
            yield f"{part}.{name.removeprefix('text_model.')}", tensor


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("prediction", "zero"), KINDS)
def test_round_trips_are_exact(tmp_path: Path, prediction: str, zero: bool, dtype: torch.dtype) -> None:
    folder = make_tiny_sdxl(
        tmp_path / "folder", prediction_type=prediction, zero_terminal_snr=zero, dtype=dtype
    )
    start = open_sdxl(folder)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_single_file(start, first, dtype=dtype, metadata=metadata(start))
    from_file = open_sdxl(first, tokenizers=folder)
    save_single_file(from_file, second, metadata=metadata(from_file))
    assert first.read_bytes() == second.read_bytes(), "file → file"
    back = tmp_path / "back"
    save_folder(from_file, back)
    same(dict(weights(back)), dict(weights(folder)))
    again = open_sdxl(back)
    for opened in (from_file, again):
        assert unet_identity(opened) == unet_identity(start)
        assert encoders_identity(opened) == encoders_identity(start)
        config = opened.scheduler_config
        assert (config["prediction_type"], bool(config["rescale_betas_zero_snr"])) == (prediction, zero)
    assert again.zeros_for_empty_prompt == start.zeros_for_empty_prompt


def test_markers_and_metadata_say_what_it_predicts(tmp_path: Path) -> None:
    for prediction, zero in KINDS:
        folder = make_tiny_sdxl(tmp_path / "model", prediction_type=prediction, zero_terminal_snr=zero)
        model, path = open_sdxl(folder), tmp_path / "m.safetensors"
        save_single_file(model, path, metadata=metadata(model) | {"modelspec.title": "T"})
        with safe_open(path, framework="pt") as file:
            keys, said = set(file.keys()), file.metadata()
        assert {"v_pred", "ztsnr"} & keys == ({"v_pred"} if prediction != "epsilon" else set()) | (
            {"ztsnr"} if zero else set()
        )
        assert said["modelspec.prediction_type"] == ("epsilon" if prediction == "epsilon" else "v")
        assert said["modelspec.title"] == "T"
        shutil.rmtree(folder)


def test_a_folder_becomes_fp16(tiny_sdxl: Path, tmp_path: Path) -> None:
    save_single_file(open_sdxl(tiny_sdxl), path := tmp_path / "m.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_trained_weights_take_the_place_of_the_unets(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = open_sdxl(tiny_sdxl)
    trained = {name: tensor + 1 for name, tensor in model.load_unet().state_dict().items()}
    path, known = tmp_path / "m.safetensors", metadata(model)
    save_single_file(model, path, dtype=torch.float32, unet=trained, metadata=known)
    same(open_sdxl(path, tokenizers=tiny_sdxl).load_unet().state_dict(), trained)
    save_folder(model, tmp_path / "folder", unet=trained)
    same(open_sdxl(tmp_path / "folder").load_unet().state_dict(), trained)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, math.nan), (torch.float16, math.inf), (torch.float8_e4m3fn, math.nan)],
)
def test_a_damaged_model_is_named_and_not_copied(
    tiny_sdxl: Path, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    file = make_file(tiny_sdxl, tmp_path / "m.safetensors", dtype=dtype)
    key = "first_stage_model.quant_conv.bias"
    edit_file(file, lambda t: t.update({key: torch.full_like(t[key].float(), value).to(dtype)}))
    model = open_sdxl(file, tokenizers=tiny_sdxl)
    for write, out in ((save_single_file, tmp_path / "out.safetensors"), (save_folder, tmp_path / "out")):
        with pytest.raises(UserError, match=r"quant_conv.bias has NaN or infinite values"):
            write(model, out)
        assert not out.exists()


def test_what_fp16_cannot_hold_is_named_and_nothing_is_written(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = open_sdxl(tiny_sdxl)
    trained = model.load_unet().state_dict()
    trained["conv_in.weight"][0, 0, 0, 0] = 7e4
    path = tmp_path / "m.safetensors"
    path.write_text("before")
    with pytest.raises(
        UserError, match=r"model\.diffusion_model\.input_blocks\.0\.0\.weight has a value of 7e\+04"
    ):
        save_single_file(model, path, unet=trained)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    save_single_file(model, path, unet=trained, dtype=torch.bfloat16)


def test_space_is_checked_first(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for write, name in ((save_single_file, "m.safetensors"), (save_folder, "folder")):
        with pytest.raises(MachineError, match="make room"):
            write(open_sdxl(tiny_sdxl), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_text_encoders_constants_are_carried_over(tiny_sdxl: Path, tmp_path: Path) -> None:
    from tests.files_of_models import edit_file, make_file

    key = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    file = make_file(tiny_sdxl, tmp_path / "a.safetensors")
    edit_file(file, lambda tensors: tensors.update({key: torch.arange(77)[None]}))
    save_single_file(open_sdxl(file, tokenizers=tiny_sdxl), tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[key], torch.arange(77)[None])


@pytest.mark.parametrize(("prediction", "zero"), [KINDS[0], KINDS[2]])
def test_diffusers_reads_both_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str, zero: bool
) -> None:
    from diffusers import StableDiffusionXLPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = make_tiny_sdxl(tmp_path / "model", prediction_type=prediction, zero_terminal_snr=zero)
    model = open_sdxl(folder)
    file = tmp_path / "m.safetensors"
    save_single_file(model, file, dtype=torch.float32, metadata=metadata(model))
    save_folder(open_sdxl(file, tokenizers=folder), ours := tmp_path / "ours")
    pipelines: dict[str, Any] = {
        "folder": StableDiffusionXLPipeline.from_pretrained(folder),
        "ours": StableDiffusionXLPipeline.from_pretrained(ours),
        "file": StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(ours), local_files_only=True
        ),
    }
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for name, pipeline in pipelines.items():
        embeds, _, pooled, _ = pipeline.encode_prompt("a red thing", device="cpu")
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        with torch.no_grad():
            # a copy, whose weights are aligned as the others' are: BLAS sums in an order that depends on it
            outputs[name] = deepcopy(pipeline.unet)(inputs, 10, embeds, added_cond_kwargs=added).sample
        assert pipeline.scheduler.config.prediction_type == prediction
        assert bool(pipeline.scheduler.config.rescale_betas_zero_snr) == zero
    assert torch.equal(outputs["ours"], outputs["folder"])
    assert torch.equal(outputs["file"], outputs["folder"])


def test_a_folder_gets_no_tokenizers_that_do_not_fit(tiny_sdxl: Path, tmp_path: Path) -> None:
    save_single_file(
        model := open_sdxl(tiny_sdxl), file := tmp_path / "m.safetensors", metadata=metadata(model)
    )
    with pytest.raises(UserError, match=r"name the model's own tokenizers as model\.tokenizers"):
        save_folder(open_sdxl(file), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
