"""A cache's model is known by what it computes, not by how its files are named, cut or described."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models.identity import encoders_identity
from mapo_fast.models.open import open_sdxl


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


def through_a_single_file(model: Path) -> None:
    """Named as in the original code (LDM's VAE, OpenCLIP's text encoder), and converted back by diffusers."""
    from diffusers.loaders import single_file_utils as original
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    path, tensors = weights(model, "vae")
    file = {f"first_stage_model.{ldm_name(name)}": conv_1x1(name, value) for name, value in tensors.items()}
    config = json.loads((model / "vae" / "config.json").read_text())
    save_file(original.convert_ldm_vae_checkpoint(file, config), path)

    path, tensors = weights(model, "text_encoder")
    file = {f"conditioner.embedders.0.transformer.{with_prefix(name)}": v for name, v in tensors.items()}
    save_file(original.convert_ldm_clip_checkpoint(file), path)

    path, tensors = weights(model, "text_encoder_2")
    prefix = "conditioner.embedders.1.model."
    file = {prefix + name: value for name, value in open_clip(tensors).items()}
    config = CLIPTextConfig(**json.loads((model / "text_encoder_2" / "config.json").read_text()))
    encoder = CLIPTextModelWithProjection(config)
    found = original.convert_open_clip_checkpoint(encoder, file, prefix)
    save_file({name: value.contiguous() for name, value in found.items()}, path)


def with_prefix(name: str) -> str:
    return f"text_model.{name.removeprefix('text_model.')}"


LDM_NAMES = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{2 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{2 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_(q|k|v)\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def ldm_name(name: str) -> str:
    for pattern, replacement in LDM_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def conv_1x1(name: str, value: torch.Tensor) -> torch.Tensor:
    return value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value


def open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {with_prefix(name) if "text_projection" not in name else name: v for name, v in tensors.items()}
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    found = {"text_projection": state.pop("text_projection.weight").T.contiguous()}
    found["logit_scale"] = torch.tensor(4.6)
    for name in list(state):
        layer = re.sub(r"text_model\.encoder\.layers", "transformer.resblocks", name)
        if ".q_proj." in name:
            joined = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            kind = name.rpartition(".")[2]
            found[layer.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}")] = torch.cat(joined)
    for name, value in state.items():
        layer = names.get(name) or re.sub(r"text_model\.encoder\.layers", "transformer.resblocks", name)
        for new, old in (("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj"), ("self_attn", "attn")):
            layer = layer.replace(new, old) if name not in names else layer
        found[layer] = value
    return found


def more_config(model: Path) -> None:
    """Notes of the libraries, and fields that only decoding and sampling look at."""
    notes = {"_diffusers_version": "0.19.0", "_name_or_path": "somewhere/else", "torch_dtype": "float16"}
    for part in ("vae", "text_encoder"):
        path = model / part / "config.json"
        settings = json.loads(path.read_text()) | notes
        if part == "vae":
            settings |= {"sample_size": 1024, "force_upcast": not settings["force_upcast"]}
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        other_metadata,
        variant,
        in_parts,
        older_names,
        through_a_single_file,
        more_config,
        without_defaults,
        one_tokenizer_file,
    ],
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


def padding(model: Path) -> None:
    edit(model / "tokenizer" / "tokenizer_config.json", pad_token="?")


def merge(model: Path) -> None:
    for path in (model / "tokenizer").glob("tokenizer.json"):
        path.unlink()
    path = model / "tokenizer" / "merges.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.parametrize("change", [half, scaled, activation, padding, merge])
def test_another_model(tiny_sdxl: Path, model: Path, change: Callable[[Path], None]) -> None:
    change(model)
    assert encoders_identity(open_sdxl(model)) != encoders_identity(open_sdxl(tiny_sdxl))
