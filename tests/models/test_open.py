"""A single file opens as the folder that it was made from: same weights, same identity, same outputs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.identity import encoders_identity, unet_identity
from mapo_fast.models.open import introduce, open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.stored import StoredTensor
from mapo_fast.util.errors import UserError
from mapo_fast.util.progress import Callbacks
from tests.files_of_models import edit_file, make_file
from tests.tiny import make_tiny_sdxl


@pytest.fixture(scope="module")
def file(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file(tiny_sdxl, tmp_path_factory.mktemp("file") / "model.safetensors")


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(file, tmp_path / "model.safetensors"))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_sdxl(path, **options)
    return str(caught.value)


class Heard(Callbacks):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str, step: int | None = None) -> None:
        self.said.append(f"warning: {text}")


def introduced(model: Pipeline) -> list[str]:
    heard = Heard()
    introduce(model, heard)
    return heard.said


def test_a_file_has_the_tensors_of_its_folder(tiny_sdxl: Path, file: Path) -> None:
    folder, single = open_sdxl(tiny_sdxl), open_sdxl(file, tokenizers=tiny_sdxl)
    for name in ("load_unet", "load_vae"):
        ours, theirs = getattr(single, name)().state_dict(), getattr(folder, name)().state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key
    for which in (1, 2):
        ours, theirs = (model.load_text_encoder(which) for model in (single, folder))
        for (key, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), key
        ids = torch.arange(77)[None]
        assert torch.equal(ours(ids)[0], theirs(ids)[0])


def test_a_file_has_the_identity_of_its_folder(tiny_sdxl: Path, file: Path) -> None:
    folder, single = open_sdxl(tiny_sdxl), open_sdxl(file, tokenizers=tiny_sdxl)
    assert encoders_identity(single) == encoders_identity(folder)
    assert unet_identity(single) == unet_identity(folder)


def test_nothing_but_the_header_is_read(tiny_sdxl: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredTensor, "load", lambda self: pytest.fail("a tensor is read"))
    open_sdxl(file, tokenizers=tiny_sdxl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_types(tiny_sdxl: Path, copy: Path, dtype: torch.dtype) -> None:
    def round_to(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if tensor.dim() > 1:
                tensors[key] = tensor.to(dtype)

    edit_file(copy, round_to)
    unet = open_sdxl(copy, tokenizers=tiny_sdxl).load_unet()
    rounded = open_sdxl(tiny_sdxl).load_unet().conv_in.weight.to(dtype).float()
    assert torch.equal(unet.conv_in.weight, rounded)


# What a model predicts


@pytest.mark.parametrize(
    ("markers", "metadata", "prediction", "zero", "why"),
    [
        ((), {}, "epsilon", False, "neither a marker"),
        (("v_pred",), {}, "v_prediction", False, "marker v_pred"),
        (("v_pred", "ztsnr"), {}, "v_prediction", True, "markers v_pred and ztsnr"),
        (("ztsnr",), {}, "epsilon", False, "neither a marker"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", False, "modelspec.prediction_type = 'v'"),
        ((), {"modelspec.predict_key": "v"}, "v_prediction", False, "modelspec.predict_key = 'v'"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v_prediction", False, "marker v_pred"),
    ],
)
def test_the_prediction_is_known_from_the_file(
    tiny_sdxl: Path,
    copy: Path,
    markers: tuple[str, ...],
    metadata: dict[str, str],
    prediction: str,
    zero: bool,
    why: str,
) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.empty(0) for name in markers})

    cleared = {"modelspec.prediction_type": "", "modelspec.predict_key": ""}
    edit_file(copy, mark, **cleared | metadata)
    model = open_sdxl(copy, tokenizers=tiny_sdxl)
    assert model.scheduler_config["prediction_type"] == prediction
    assert bool(model.scheduler_config["rescale_betas_zero_snr"]) == zero
    said = introduced(model)
    assert why in said[0]
    assert ("v" if prediction == "v_prediction" else "epsilon") in said[0]
    assert len(said) == 1


def test_a_setting_overrides_and_a_disagreement_is_said(tiny_sdxl: Path, copy: Path) -> None:
    override = {"prediction_type": "v_prediction"}
    said = introduced(open_sdxl(copy, None, override, tokenizers=tiny_sdxl))
    assert "predicts v: train.prediction says so" in said[0]
    assert "warning: train.prediction sets prediction_type = 'v_prediction'" in said[1]
    edit_file(copy, lambda tensors: None, **{"modelspec.prediction_type": "", "modelspec.predict_key": ""})
    assert len(introduced(open_sdxl(copy, None, override, tokenizers=tiny_sdxl))) == 1, (
        "nothing said otherwise"
    )


def test_the_schedule_is_that_of_the_folder(tiny_sdxl: Path, file: Path) -> None:
    ours, theirs = (
        Diffusion(open_sdxl(path, tokenizers=tiny_sdxl).scheduler_config) for path in (file, tiny_sdxl)
    )
    assert torch.equal(ours.scheduler.betas, theirs.scheduler.betas)


@pytest.mark.parametrize("title", ["Juggernaut Lightning", "SDXL-Turbo mix", "my lcm merge"])
def test_a_model_of_few_steps_is_warned_of(tiny_sdxl: Path, copy: Path, title: str) -> None:
    edit_file(copy, lambda tensors: None, **{"modelspec.title": title})
    assert "distilled to sample in a few steps" in introduced(open_sdxl(copy, tokenizers=tiny_sdxl))[1]


def test_an_ordinary_title_is_not(tiny_sdxl: Path, copy: Path) -> None:
    edit_file(copy, lambda tensors: None, **{"modelspec.title": "Lightnings and turbomachines"})
    assert len(introduced(open_sdxl(copy, tokenizers=tiny_sdxl))) == 1


# Parts from elsewhere


ENCODERS = ("conditioner.", "first_stage_model.")


def without(*beginnings: str) -> Any:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(beginnings)]:
            del tensors[key]

    return remove


def test_what_a_file_lacks_comes_from_the_base(tiny_sdxl: Path, copy: Path) -> None:
    edit_file(copy, without(*ENCODERS))
    text = refusal(copy)
    assert "has no VAE and first text encoder and second text encoder: set model.base" in text
    model = open_sdxl(copy, base=tiny_sdxl)
    assert encoders_identity(model) == encoders_identity(open_sdxl(tiny_sdxl))
    assert any(f"taken from model.base {tiny_sdxl}" in line for line in introduced(model))


def test_a_base_may_be_a_file(tiny_sdxl: Path, file: Path, copy: Path) -> None:
    edit_file(copy, without("first_stage_model."))
    model = open_sdxl(copy, base=file, tokenizers=tiny_sdxl)
    assert model.where("vae") == file
    assert model.where("text_encoder") == copy


def test_a_base_that_lacks_it_too(copy: Path, tmp_path: Path) -> None:
    edit_file(copy, without("first_stage_model."))
    other = shutil.copy(copy, tmp_path / "other.safetensors")
    assert "has no VAE either" in refusal(copy, base=Path(other))


@pytest.mark.parametrize("kind", ["folder", "pipeline", "diffusers file", "original file", "whole file"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_another_unet_or_vae(tiny_sdxl: Path, file: Path, tmp_path: Path, part: str, kind: str) -> None:
    other = make_tiny_sdxl(tmp_path / "other", seed=1)
    (weights,) = (other / part).glob("*.safetensors")
    path = {"folder": other / part, "pipeline": other, "diffusers file": weights}.get(kind)
    if path is None:
        path = make_file(other, tmp_path / "whole.safetensors")
        if kind == "original file":
            prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[part]
            metadata = open_sdxl(path, tokenizers=other).parts["vae"].header.metadata  # type: ignore[union-attr]
            alone = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
            save_file(alone, path, metadata=metadata)
    for model in (tiny_sdxl, file):
        options: dict[str, Any] = {part: path, "tokenizers": tiny_sdxl}
        opened = open_sdxl(model, **options)
        loaded = getattr(opened, f"load_{part}")().state_dict()
        expected = getattr(open_sdxl(other), f"load_{part}")().state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


def test_another_unet_brings_its_prediction(tiny_sdxl: Path, copy: Path) -> None:
    edit_file(copy, lambda tensors: tensors.update(v_pred=torch.empty(0)))
    assert open_sdxl(tiny_sdxl, unet=copy).scheduler_config["prediction_type"] == "v_prediction"
    assert open_sdxl(tiny_sdxl).scheduler_config["prediction_type"] == "epsilon"


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_what_is_wrong_with_another_part_is_blamed_on_its_setting(
    tiny_sdxl: Path, tmp_path: Path, part: str
) -> None:
    wrong = tmp_path / "wrong.safetensors"
    assert refusal(tiny_sdxl, **{part: wrong}).startswith(f"model.{part} not found: {wrong}")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, wrong)
    assert refusal(tiny_sdxl, **{part: wrong}).startswith(f"model.{part} cannot be used: {wrong} is a LoRA")
    save_file({"something": torch.zeros(2, 2)}, wrong)
    assert f"{wrong} has no " in refusal(tiny_sdxl, **{part: wrong})
    wrong.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "it is a pickle" in refusal(tiny_sdxl, **{part: wrong})


def test_tokenizers_of_their_own(tiny_sdxl: Path, file: Path, tmp_path: Path) -> None:
    text = refusal(file, tokenizers=tmp_path / "none")
    assert text.startswith(f"model.tokenizers not found: {tmp_path / 'none'}")
    assert "model.tokenizers cannot be used" in refusal(file, tokenizers=tmp_path)
    with pytest.raises(UserError, match=r"name the model's own tokenizers as model\.tokenizers"):
        open_sdxl(file).load_tokenizer(1)


# Damage


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.out.2.bias",
        "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
        "first_stage_model.quant_conv.bias",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.ln_final.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
    ],
)
def test_a_missing_key_is_named(copy: Path, key: str) -> None:
    edit_file(copy, lambda tensors: tensors.pop(key))
    text = refusal(copy)
    assert str(copy) in text
    assert key in text or "label_emb" in key


def test_a_vocabulary_of_three_dimensions_is_named(copy: Path) -> None:
    key = "conditioner.embedders.1.model.token_embedding.weight"
    edit_file(copy, lambda tensors: tensors.update({key: tensors[key][None].clone()}))
    assert str(copy) in refusal(copy)


def test_what_does_not_fit_is_named(copy: Path) -> None:
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    edit_file(copy, lambda tensors: tensors.update({key: torch.zeros(7, 24)}))
    assert "no 3 equal parts" in refusal(copy)
    edit_file(copy, lambda tensors: tensors.update({key: torch.zeros(75, 24)}))
    assert f"has another shape of the tensor {key}" in refusal(copy)
    edit_file(copy, lambda tensors: tensors.update({key: torch.zeros(72, 24, dtype=torch.int8)}))
    assert f"has the tensor {key} as I8" in refusal(copy)


def test_keys_of_no_part_are_named(copy: Path) -> None:
    edit_file(copy, lambda tensors: tensors.update({"model.diffusion_model.more.weight": torch.zeros(1)}))
    assert "has the tensor 'model.diffusion_model.more.weight', which SDXL's UNet does not have" in refusal(
        copy
    )


@pytest.mark.parametrize("text", ["[]", "{", '{"unet": []}', '{"unet": {"_class_name": "os.system"}}'])
def test_configs_in_metadata_are_distrusted(copy: Path, text: str) -> None:
    edit_file(copy, lambda tensors: None, **{"mapo_fast.configs": text})
    assert "metadata mapo_fast.configs" in refusal(copy)
