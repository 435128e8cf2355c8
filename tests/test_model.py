"""Incomplete or foreign pipeline folders are refused in one line that names the part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.errors import UserError
from mapo_fast.model import SDXLFolder, open_sdxl
from tests.tiny import make_tiny_sdxl


@pytest.fixture
def model(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))


def refusal(call: Callable[[], Any]) -> str:
    """The one line that `call` ends with."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | changes), encoding="utf-8")


def edit_weights(model: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    (path,) = (model / part).glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


LOADERS: dict[str, tuple[Callable[[SDXLFolder], Any], str]] = {
    "text_encoder": (lambda f: f.load_text_encoder(1), "self_attn.q_proj"),
    "text_encoder_2": (lambda f: f.load_text_encoder(2, torch.float16), "text_projection"),
    "unet": (lambda f: f.load_unet(), "conv_in"),
    "vae": (lambda f: f.load_vae(torch.bfloat16), "encoder.conv_in"),
}


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_missing_weights(tiny_sdxl: Path, tmp_path: Path, part: str, variant: str | None) -> None:
    load, name = LOADERS[part]
    model = (
        Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
        if variant is None
        else make_tiny_sdxl(tmp_path / "model", variant=variant)
    )
    load(open_sdxl(model))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if name in key]:
            del tensors[key]

    path = edit_weights(model, part, drop)
    text = refusal(lambda: load(open_sdxl(model)))
    assert f"{path} lacks the tensor " in text
    assert name in text


@pytest.mark.parametrize("part", LOADERS)
def test_weights_of_another_shape(model: Path, part: str) -> None:
    load, name = LOADERS[part]

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if f"{name}.weight" in key)
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    path = edit_weights(model, part, widen)
    text = refusal(lambda: load(open_sdxl(model)))
    assert f"{path} has another shape of the tensor " in text
    assert name in text


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_incomplete_tokenizer(model: Path, part: str, name: str) -> None:
    for file in (name, "tokenizer.json"):
        (model / part / file).unlink(missing_ok=True)
    assert refusal(lambda: open_sdxl(model)).endswith(f"{model / part / name} is missing")


def test_tokenizer_json_alone_is_enough(model: Path) -> None:
    expected = open_sdxl(model).load_tokenizer(2)
    expected.backend_tokenizer.save(str(model / "tokenizer_2" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer_2" / name).unlink()
    got = open_sdxl(model).load_tokenizer(2)
    assert got("a red thing").input_ids == expected("a red thing").input_ids


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_vocabulary(model: Path, content: str) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (model / "tokenizer" / "vocab.json").write_text(content)
    assert str(model / "tokenizer") in refusal(lambda: open_sdxl(model).load_tokenizer(1))


@pytest.mark.parametrize(
    "changes",
    [{"_class_name": "AutoencoderTiny"}, {"latent_channels": None}, {"block_out_channels": []}],
)
def test_foreign_vae_config(model: Path, changes: dict[str, Any]) -> None:
    edit(model / "vae" / "config.json", **changes)
    text = refusal(lambda: open_sdxl(model))
    assert str(model / "vae" / "config.json") in text
    assert next(iter(changes)) in text


def test_vae_of_another_number_of_channels(model: Path) -> None:
    edit(model / "vae" / "config.json", latent_channels=16)
    text = refusal(lambda: open_sdxl(model))
    assert "has 4 input channels" in text
    assert f"{model / 'vae'} have 16" in text


def test_another_kind_of_model_is_named(model: Path) -> None:
    edit(model / "unet" / "config.json", _class_name="SD3Transformer2DModel")
    text = refusal(lambda: open_sdxl(model))
    assert "_class_name = 'SD3Transformer2DModel', SDXL has 'UNet2DConditionModel'" in text


def test_inpainting_unet(model: Path) -> None:
    edit(model / "unet" / "config.json", in_channels=9)
    assert "is an inpainting UNet (9 input channels" in refusal(lambda: open_sdxl(model))


def test_another_vae_folder_is_blamed_by_its_own_setting(tiny_sdxl: Path, tmp_path: Path) -> None:
    missing = refusal(lambda: open_sdxl(tiny_sdxl, tmp_path / "nowhere"))
    assert missing.startswith(f"model.vae not found: {tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    empty = refusal(lambda: open_sdxl(tiny_sdxl, tmp_path / "empty"))
    assert empty.startswith("model.vae cannot be used: ")
    assert str(tmp_path / "empty" / "config.json") in empty


@pytest.mark.parametrize("setting", ["model.path", "model.vae"])
def test_folder_without_permission(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    forbidden, is_dir = Path("/forbidden"), Path.is_dir

    def refusing(self: Path) -> bool:
        if self == forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", refusing)
    paths = (forbidden,) if setting == "model.path" else (tiny_sdxl, forbidden)
    assert refusal(lambda: open_sdxl(*paths)) == f"{setting} = {forbidden} cannot be read: Permission denied"


def test_loading_is_silent_and_leaves_the_libraries_settings(
    tiny_sdxl: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    folder = open_sdxl(tiny_sdxl)
    folder.load_tokenizer(1)
    for load, _ in LOADERS.values():
        load(folder)
    assert "Loading" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity
