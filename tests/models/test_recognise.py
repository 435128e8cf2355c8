"""A single file is known by its keys and shapes; what cannot be trained is refused by what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.hollow import Keys, hollow, listed, sdxl_keys
from mapo_fast.models import single_file
from mapo_fast.models.from_shapes import CONFIGS_FROM
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.original import PREFIXES
from mapo_fast.models.parts import file_part
from mapo_fast.models.recognise import part_alone, recognise
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorheader import Header, read_header


@pytest.fixture(scope="module")
def sdxl() -> Keys:
    return sdxl_keys()


@pytest.fixture(scope="module")
def header(sdxl: Keys, tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(hollow(tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors", sdxl))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_sdxl(path)
    text = str(caught.value)
    assert str(path) in text
    return text


def test_the_full_model_is_recognised_by_an_independent_list(header: Header, sdxl: Keys) -> None:
    assert len(sdxl) > 2500
    found = recognise(header)
    assert found.prefixes == PREFIXES
    used: set[str] = set()
    for component, prefix in found.prefixes.items():
        part = file_part(component, header, prefix)
        part.check()
        used |= set(part.keys.values())
    assert used == sdxl.keys()


def test_the_full_models_configs_follow_from_its_shapes(header: Header) -> None:
    shapes = {
        part: {
            key.removeprefix(prefix): entry.shape
            for key, entry in header.tensors.items()
            if key.startswith(prefix)
        }
        for part, prefix in PREFIXES.items()
    }
    configs = {part: CONFIGS_FROM[part](shapes[part]) for part in PREFIXES}
    assert SDXL_UNET.items() <= configs["unet"].items()
    assert configs["vae"]["block_out_channels"] == [128, 256, 512, 512]
    assert configs["vae"]["scaling_factor"] == 0.13025
    assert [configs[part]["num_hidden_layers"] for part in ("text_encoder", "text_encoder_2")] == [12, 32]
    assert [configs[part]["num_attention_heads"] for part in ("text_encoder", "text_encoder_2")] == [12, 20]
    assert [configs[part]["hidden_act"] for part in ("text_encoder", "text_encoder_2")] == [
        "quick_gelu",
        "gelu",
    ]


def test_the_full_model_is_written_with_the_listed_keys_and_shapes(header: Header, sdxl: Keys) -> None:
    model = open_sdxl(header.path)
    written = single_file.pieces(model)
    shapes = {key: shape for key, (_, shape) in sdxl.items()}
    assert {key: piece.shape for key, piece in written.items()} == shapes
    assert "mapo_fast.configs" not in single_file.metadata(model), "its shapes tell everything"


def test_constants_and_leftovers_are_let_through(tmp_path: Path, sdxl: Keys) -> None:
    rest = {k: ("F32", s) for k, s in listed().items() if k not in sdxl and not k.startswith("edm")}
    assert len(rest) > 10
    open_sdxl(hollow(tmp_path / "m.safetensors", sdxl | rest | {"denoiser.sigmas": ("F32", (1000,))}))


# What is refused


UNET = PREFIXES["unet"]
FIRST = f"{UNET}input_blocks.0.0.weight"


def reshaped(keys: Keys, key: str, *shape: int) -> Keys:
    return keys | {key: ("F16", shape)}


def only(keys: Keys, *beginnings: str) -> Keys:
    return {key: value for key, value in keys.items() if key.startswith(beginnings)}


def bare(keys: Keys, prefix: str) -> Keys:
    return {key.removeprefix(prefix): value for key, value in only(keys, prefix).items()}


def tensor(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "F16", shape


def without_blocks(keys: Keys, depth: int) -> Keys:
    """Fewer transformer blocks in every place, and a middle without attention, as distilled models have."""
    kept = {}
    for key, value in keys.items():
        blocks = key.split(".transformer_blocks.")
        if "middle_block.1." in key or "middle_block.2." in key:
            continue
        if len(blocks) == 2 and int(blocks[1].split(".")[0]) >= depth:
            continue
        kept[key] = value
    return kept


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda k: reshaped(k, FIRST, 320, 9, 3, 3),
            "inpainting model (9 input channels)",
        ),
        (
            lambda k: reshaped(k, FIRST, 320, 8, 3, 3),
            "editing model (8 input channels",
        ),
        (
            lambda k: reshaped(k, FIRST, 320, 5, 3, 3),
            "has 5 input channels",
        ),
        (lambda k: k | {"edm_mean": tensor(4), "edm_std": tensor(4)}, "Playground v2.5"),
        (lambda k: k | {"edm_vpred.sigma_max": tensor(), "edm_vpred.sigma_min": tensor()}, "v-EDM"),
        (lambda k: k | {f"{UNET}scaled_fp8": tensor(2)}, "scaled fp8"),
        (lambda k: k | {f"{UNET}out.2.scale_weight": tensor(1)}, "scaled fp8"),
        (lambda k: k | {f"{UNET}out.2.comfy_quant": tensor(1)}, "scaled fp8"),
        (lambda k: k | {f"{UNET}out.2.weight.absmax": tensor(1)}, "quantised weights"),
        (lambda k: without_blocks(k, 4), "SSD-1B"),
        (lambda k: without_blocks(k, 2), "Segmind-Vega"),
        (lambda k: k | {"down_blocks.0.resnets.0.conv1.weight": tensor(1)}, "keys of two models"),
        (lambda k: k | {"cond_stage_model.transformer.text_model.x": tensor(1)}, "keys of two models"),
        (lambda k: k | {"something.else": tensor(1)}, "1 keys that belong to no part"),
        (lambda k: only(k, UNET), "set model.base"),
        (
            lambda k: only(k, UNET) | {"cond_stage_model.transformer.text_model.x": tensor(1)},
            "Stable Diffusion 1",
        ),
        (lambda k: only(k, UNET) | {"cond_stage_model.model.x": tensor(1)}, "Stable Diffusion 2"),
        (lambda k: only(k, UNET) | {"conditioner.embedders.0.model.x": tensor(1)}, "the SDXL refiner"),
        (
            lambda k: only(k, "first_stage_model."),
            "is a VAE alone: name a whole model, and this file as --vae",
        ),
        (lambda k: bare(k, "first_stage_model."), "is a VAE alone"),
        (lambda k: bare(k, UNET), "is a UNet alone: name a whole model, and this file as --unet"),
        (lambda k: bare(k, "conditioner.embedders.0.transformer."), "is a text encoder alone"),
        (lambda k: {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": tensor(1, 1)}, "is a LoRA"),
        (lambda k: {"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": tensor(1, 1)}, "is a LoRA"),
        (lambda k: {"lora_unet_x.hada_w1_a": tensor(1, 1)}, "is a LoRA"),
        (lambda k: {f"{UNET}joint_blocks.0.x": tensor(1)}, "Stable Diffusion 3"),
        (lambda k: {f"{UNET}double_blocks.0.x": tensor(1)}, "Flux"),
        (lambda k: {"double_blocks.0.x": tensor(1)}, "Flux"),
        (lambda k: {f"{UNET}blocks.0.x": tensor(1)}, "transformer"),
        (lambda k: {"controlnet_cond_embedding.conv_in.weight": tensor(1)}, "ControlNet"),
        (lambda k: {"clip_l": tensor(1, 768), "clip_g": tensor(1, 1280)}, "is not an SDXL model"),
        (lambda k: {}, "has no tensors"),
        (lambda k: {n: v for n, v in k.items() if ".resblocks.31." not in n}, "lacks the tensor"),
        (lambda k: {n: v for n, v in k.items() if "text_projection" not in n}, "text_projection"),
        (lambda k: {n: v for n, v in k.items() if ".layers.11." not in n}, "lacks the tensor"),
        (lambda k: {n: v for n, v in k.items() if "label_emb" not in n}, "label_emb.0.0.weight"),
        (lambda k: k | {f"{UNET}out.2.weight": ("I8", (4, 320, 3, 3))}, "as I8"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, sdxl: Keys, change: Any, says: str) -> None:
    assert says in refusal(hollow(tmp_path / "m.safetensors", change(sdxl)))


def test_a_name_says_nothing(tmp_path: Path, sdxl: Keys) -> None:
    path = hollow(tmp_path / "sd15-inpainting.ckpt", sdxl)
    assert open_sdxl(path).where("unet") == path


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_parts_alone(tmp_path: Path, sdxl: Keys, part: str) -> None:
    whole = read_header(hollow(tmp_path / "whole", sdxl))
    alone = read_header(hollow(tmp_path / "alone", bare(sdxl, PREFIXES[part])))
    assert part_alone(whole, part) == PREFIXES[part]
    assert part_alone(alone, part) == ""
