"""LoRA files of every layout are found in the model, and give what the adapter gives; others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.models.identity import encoders_identity, unet_identity
from mapo_fast.models.lora import add_lora, save_lora
from mapo_fast.models.lora_file import read_lora
from mapo_fast.models.merge import with_loras
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import kohya_name, original_layer
from mapo_fast.util.errors import UserError

RANK, ALPHA = 4, 8.0
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj"]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Pipeline:
    return open_sdxl(tiny_sdxl)


@pytest.fixture(scope="module")
def unet(model: Pipeline) -> Any:
    """With an adapter that does something, alpha other than its rank, convolutions too, in fp64."""
    unet = model.load_unet(torch.float64)
    add_lora(unet, rank=RANK, alpha=ALPHA, targets=TARGETS, seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data = drawn.mul_(0.05).double()
    return unet


@pytest.fixture(scope="module")
def factors(unet: Any) -> Factors:
    found = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            found[name] = tuple(m["default"].weight.detach().float() for m in (module.lora_A, module.lora_B))
    return found


@pytest.fixture(scope="module")
def expected(unet: Any) -> torch.Tensor:
    return output(unet)


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=generator).double()
    text = torch.randn(2, 77, 40, generator=generator).double()
    pooled = torch.randn(2, 24, generator=generator).double()
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    return unet(latents, 500, text, added_cond_kwargs=added).sample  # type: ignore[no-any-return]


def ours(folder: Path, unet: Any, _: Factors) -> Path:
    save_lora(unet.float(), folder / "lora")
    unet.double()
    return folder / "lora" / "pytorch_lora_weights.safetensors"


def ours_kohya(folder: Path, unet: Any, factors: Factors) -> Path:
    return ours(folder, unet, factors).with_name("lora_kohya.safetensors")


def peft_folder(folder: Path, unet: Any, factors: Factors) -> Path:
    """A folder as written by peft's `save_pretrained`."""
    tensors = {}
    for layer, (down, up) in factors.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_rank_stabilised(folder: Path, unet: Any, factors: Factors) -> Path:
    path = peft_folder(folder, unet, factors)
    config = {"r": RANK, "lora_alpha": ALPHA / RANK**0.5, "use_rslora": True}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def named(name: Callable[[str], str], down: str, up: str, alpha: bool = True) -> Any:
    def make(folder: Path, unet: Any, factors: Factors) -> Path:
        tensors = {}
        for layer, (first, second) in factors.items():
            tensors[name(layer) + down] = first
            tensors[name(layer) + up] = second if alpha else second * (ALPHA / RANK)
            if alpha:
                tensors[name(layer) + ".alpha"] = torch.tensor(ALPHA)
        save_file(tensors, path := folder / "lora.safetensors")
        return path

    return make


KOHYA = ".lora_down.weight", ".lora_up.weight"
LAYOUTS: dict[str, Any] = {
    "this project's": ours,
    "this project's for kohya": ours_kohya,
    "peft": peft_folder,
    "peft, rank stabilised": peft_rank_stabilised,
    "kohya, original blocks": named(lambda layer: kohya_name(layer, [1, 1]), *KOHYA),
    "kohya, diffusers' blocks": named(lambda layer: "lora_unet_" + layer.replace(".", "_"), *KOHYA),
    "LyCORIS": named(lambda layer: "lycoris_" + layer.replace(".", "_"), *KOHYA),
    "diffusers": named(lambda layer: f"unet.{layer}", ".lora_A.weight", ".lora_B.weight", False),
    "diffusers before peft": named(
        lambda layer: f"unet.{layer}", ".lora.down.weight", ".lora.up.weight", False
    ),
    "ComfyUI": named(
        lambda layer: "diffusion_model." + original_layer(layer, [1, 1]),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "checkpoint": named(lambda layer: layer, ".lora_A.weight", ".lora_B.weight", False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_lora_is_the_active_adapter(
    model: Pipeline, unet: Any, factors: Factors, expected: torch.Tensor, tmp_path: Path, layout: str
) -> None:
    path = LAYOUTS[layout](tmp_path, unet, factors)
    assert set(read_lora(path, model.parts).parts["unet"]) == factors.keys()
    merged = with_loras(model, [(path, 1.0)])
    assert float((output(merged.load_unet(torch.float64)) - expected).abs().max()) <= 1e-10


def test_attention_processors_of_old(model: Pipeline, factors: Factors, tmp_path: Path) -> None:
    tensors, layers = {}, [layer for layer in factors if layer.endswith(("to_q", "to_out.0"))]
    for layer in layers:
        place, _, projection = layer.partition(".to_")
        old = f"unet.{place}.processor.to_{projection.removesuffix('.0')}_lora"
        tensors[f"{old}.down.weight"], tensors[f"{old}.up.weight"] = factors[layer]
    save_file(tensors, path := tmp_path / "lora.safetensors")
    assert read_lora(path, model.parts).parts["unet"].keys() == set(layers)


def test_ranks_may_differ_and_weights_scale(model: Pipeline, tmp_path: Path) -> None:
    layers = [name.removesuffix(".weight") for name in model.parts["unet"].shapes if "attn1.to_q" in name][:2]
    generator, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    for rank, layer in zip((1, 3), layers, strict=True):
        width = model.parts["unet"].shapes[f"{layer}.weight"][0]
        down, up = (
            torch.randn(rank, width, generator=generator),
            torch.randn(width, rank, generator=generator),
        )
        name = kohya_name(layer, [1, 1])
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
        deltas[layer] = 2.0 / rank * up.double() @ down.double()
    save_file(tensors, path := tmp_path / "lora.safetensors")
    before = model.load_unet(torch.float64).state_dict()
    after = with_loras(model, [(path, 0.5), (path, 0.25)]).load_unet(torch.float64).state_dict()
    for layer, delta in deltas.items():
        weight = f"{layer}.weight"
        torch.testing.assert_close(after[weight], before[weight] + 0.75 * delta, rtol=0, atol=1e-14)
    same = before.keys() - {f"{layer}.weight" for layer in layers}
    assert all(torch.equal(after[name], before[name]) for name in same)


def text_lora(path: Path, model: Pipeline) -> Path:
    tensors = {}
    for component, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        layer = "encoder.layers.0.self_attn.q_proj"
        width = model.parts[component].shapes[f"{layer}.weight"][0]
        name = prefix + "text_model_" + layer.replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(1, width),
            f"{name}.lora_up.weight": torch.ones(width, 1),
        }
    tensors["lora_te2_text_projection.lora_down.weight"] = torch.ones(1, 24)
    tensors["lora_te2_text_projection.lora_up.weight"] = torch.ones(24, 1)
    save_file(tensors, path)
    return path


def test_text_encoders_get_their_part(model: Pipeline, tmp_path: Path) -> None:
    merged = with_loras(model, [(text_lora(tmp_path / "lora.safetensors", model), 1.0)])
    for which, changed in ((1, 1), (2, 2)):
        before, after = (m.load_text_encoder(which).state_dict() for m in (model, merged))  # type: ignore[arg-type]
        assert sum(not torch.equal(before[name], after[name]) for name in before) == changed
    assert encoders_identity(merged) != encoders_identity(model)
    assert unet_identity(merged) == unet_identity(model)


def test_a_lora_of_the_unet_leaves_the_cache_alone(
    model: Pipeline, unet: Any, factors: Factors, tmp_path: Path
) -> None:
    path = ours_kohya(tmp_path, unet, factors)
    whole, half = (with_loras(model, [(path, weight)]) for weight in (1.0, 0.5))
    assert encoders_identity(whole) == encoders_identity(model)
    assert len({unet_identity(m) for m in (model, whole, half)}) == 3


# What is refused


def refusal(path: Path, model: Pipeline) -> str:
    with pytest.raises(UserError) as caught:
        read_lora(path, model.parts)
    text = str(caught.value)
    assert str(path) in text
    return text


LAYER = "lora_unet_input_blocks_1_0_in_layers_2"
SD1 = "down_blocks_0_attentions_0_transformer_blocks_0"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({f"{LAYER}.dora_scale": (1, 1)}, "DoRA"),
        ({f"{LAYER}.lora_magnitude_vector": (1,)}, "DoRA"),
        ({f"{LAYER}.hada_w1_a": (1, 1)}, "LoHa"),
        ({f"{LAYER}.lokr_w1": (1, 1)}, "LoKr"),
        ({f"{LAYER}.oft_blocks": (1, 1, 1)}, "OFT"),
        ({f"{LAYER}.lora_mid.weight": (1, 1, 3, 3)}, "Tucker"),
        ({f"{LAYER}.diff": (1, 1)}, "difference of whole layers"),
        ({f"{LAYER}.a1.weight": (1, 1)}, "GLoRA"),
        ({"lora_unet_double_blocks_0.lora_up.weight": (1, 1)}, "for another model"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (1, 1)}, "it is not a LoRA"),
        ({f"{LAYER}.lora_up.weight": (16, 4, 1, 1)}, "one of the two factors"),
        (
            {f"{LAYER}.lora_up.weight": (16, 4, 1, 1), f"{LAYER}.lora_down.weight": (4, 8, 3, 3)},
            "whose weight is",
        ),
        (
            {f"{LAYER}.lora_up.weight": (16, 3, 1, 1), f"{LAYER}.lora_down.weight": (4, 16, 3, 3)},
            "whose weight is",
        ),
        ({f"{LAYER}.alpha": (2,)}, "not one number"),
        ({f"lora_unet_{SD1}_attn2_to_k.lora_down.weight": (4, 768)}, "for Stable Diffusion 1"),
        ({f"unet.{SD1.replace('_', '.')}.attn2.processor.to_v_lora.down.weight": (4, 768)}, "Diffusion 1"),
        ({f"lora_unet_{SD1}_attn2_to_v.lora_down.weight": (4, 1024)}, "for Stable Diffusion 2"),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 1024)}, "Diffusion 2"),
        ({}, "no LoRA"),
        ({f"{LAYER}.alpha": ()}, "it is not a LoRA"),
    ],
)
def test_other_files_are_named(
    model: Pipeline, tmp_path: Path, keys: dict[str, tuple[int, ...]], says: str
) -> None:
    save_file({key: torch.ones(shape) for key, shape in keys.items()}, path := tmp_path / "x.safetensors")
    assert says in refusal(path, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["lora_up.weight", "alpha"])
def test_values_that_are_no_numbers(
    model: Pipeline, unet: Any, factors: Factors, tmp_path: Path, value: float, which: str
) -> None:
    path = ours_kohya(tmp_path, unet, factors)
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(which))
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, path)
    assert "damaged" in refusal(path, model) or "not a number" in refusal(path, model)


def test_an_alpha_of_a_type_that_is_none_of_torch_s(
    model: Pipeline, unet: Any, factors: Factors, tmp_path: Path
) -> None:
    path = ours_kohya(tmp_path, unet, factors)
    data = path.read_bytes()
    head, _, rest = data.partition(b'.alpha":{"dtype":"F32"')
    path.write_bytes(head + b'.alpha":{"dtype":"U32"' + rest)
    assert "U32" in refusal(path, model)


@pytest.mark.parametrize("version", ["sd_v1.5", "flux1"])
def test_a_lora_for_another_model_says_so(
    model: Pipeline, unet: Any, factors: Factors, tmp_path: Path, version: str
) -> None:
    path = ours_kohya(tmp_path, unet, factors)
    save_file(load_file(path), path, metadata={"ss_base_model_version": version})
    assert version in refusal(path, model)


def test_another_prediction_is_refused(model: Pipeline, unet: Any, factors: Factors, tmp_path: Path) -> None:
    path = ours_kohya(tmp_path, unet, factors)
    save_file(load_file(path), path, metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(UserError, match="is for v_prediction by its metadata"):
        with_loras(model, [(path, 1.0)])


def test_what_is_not_there(model: Pipeline, tmp_path: Path) -> None:
    assert "LoRA not found" in refusal(tmp_path / "none.safetensors", model)
    assert "adapter_model.safetensors" in refusal(tmp_path, model)
    shutil.rmtree(tmp_path)
