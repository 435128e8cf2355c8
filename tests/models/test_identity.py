"""A cache's model is known by what it computes, not by how its files are named, cut or described."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models.identity import encoders_identity
from mapo_fast.models.pipeline import open_sdxl


@pytest.fixture
def model(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))


def weights(model: Path, part: str) -> tuple[Path, dict[str, torch.Tensor]]:
    (path,) = (model / part).glob("*.safetensors")
    return path, load_file(path)


def other_metadata(model: Path) -> None:
    path, tensors = weights(model, "text_encoder")
    save_file(tensors, path, metadata={"format": "pt", "note": "saved again"})


def variant(model: Path) -> None:
    path, _ = weights(model, "vae")
    path.rename(path.with_suffix(".fp16.safetensors"))


def in_parts(model: Path) -> None:
    path, tensors = weights(model, "text_encoder_2")
    path.unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, path.with_name(file), metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def older_names(model: Path) -> None:
    path, tensors = weights(model, "text_encoder")
    changed = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
    save_file(
        changed | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        path,
        metadata={"format": "pt"},
    )
    path, tensors = weights(model, "text_encoder_2")
    save_file(tensors | {"logit_scale": torch.tensor(4.6)}, path, metadata={"format": "pt"})
    path, tensors = weights(model, "vae")
    changed = {}
    for name, value in tensors.items():
        for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value.")):
            name = name.replace(new, old)
        changed[name.replace(".to_out.0.", ".proj_attn.")] = value
    save_file(changed, path, metadata={"format": "pt"})


def more_config(model: Path) -> None:
    for part in ("vae", "text_encoder"):
        path = model / part / "config.json"
        settings = json.loads(path.read_text()) | {"_diffusers_version": "0.19.0", "torch_dtype": "float16"}
        path.write_text(json.dumps(settings, indent=7, sort_keys=True))


def without_defaults(model: Path) -> None:
    path = model / "vae" / "config.json"
    settings = json.loads(path.read_text())
    for name in ("latents_mean", "latents_std", "use_quant_conv", "act_fn", "shift_factor"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings))


def one_tokenizer_file(model: Path) -> None:
    tokenizer = open_sdxl(model).load_tokenizer(2)
    tokenizer.backend_tokenizer.save(str(model / "tokenizer_2" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer_2" / name).unlink()


@pytest.mark.parametrize(
    "change",
    [other_metadata, variant, in_parts, older_names, more_config, without_defaults, one_tokenizer_file],
)
def test_the_same_model_saved_otherwise(tiny_sdxl: Path, model: Path, change: Callable[[Path], None]) -> None:
    change(model)
    assert encoders_identity(open_sdxl(model)) == encoders_identity(open_sdxl(tiny_sdxl))


def half(model: Path) -> None:
    path, tensors = weights(model, "vae")
    save_file({name: value.half() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def scaled(model: Path) -> None:
    edit(model / "vae" / "config.json", scaling_factor=0.2)


def activation(model: Path) -> None:
    edit(model / "text_encoder" / "config.json", hidden_act="gelu")


def fewer_layers(model: Path) -> None:
    edit(model / "text_encoder_2" / "config.json", num_hidden_layers=1)


def padding(model: Path) -> None:
    edit(model / "tokenizer" / "tokenizer_config.json", pad_token="?")


def merge(model: Path) -> None:
    for path in (model / "tokenizer").glob("tokenizer.json"):
        path.unlink()
    path = model / "tokenizer" / "merges.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("change", [half, scaled, activation, fewer_layers, padding, merge])
def test_another_model(tiny_sdxl: Path, model: Path, change: Callable[[Path], None]) -> None:
    change(model)
    assert encoders_identity(open_sdxl(model)) != encoders_identity(open_sdxl(tiny_sdxl))
