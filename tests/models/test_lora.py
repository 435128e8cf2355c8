"""LoRA: initialisation, targets, and files that other programs load with equal outputs."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mapo_fast.models.lora import add_lora, lora_state_dict, save_lora
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(autouse=True)
def _quiet_diffusers() -> Iterator[None]:
    """diffusers tells, at warning level, that these files have no text-encoder layers."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    yield
    logging.getLogger("diffusers").setLevel(logging.WARNING)


def sdxl_unet(dtype: torch.dtype = torch.float32, layers: Any = 2) -> Any:
    """SDXL's blocks in SDXL's order, two layers each, very narrow."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=layers,
            transformer_layers_per_block=(1, 1, 2),
            norm_num_groups=4,
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
            use_linear_projection=True,
        )
        .to(dtype)
        .eval()
    )


def predict(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = unet.conv_in.weight.dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    with torch.no_grad():
        return unet(
            draw(2, 4, 8, 8),
            torch.tensor([3, 700]),
            draw(2, 5, 16),
            added_cond_kwargs={"text_embeds": draw(2, 8), "time_ids": torch.ones(2, 6)},
        ).sample


def trained(targets: tuple[str, ...], alpha: float, dtype: torch.dtype = torch.float32) -> Any:
    unet = sdxl_unet(dtype)
    add_lora(unet, rank=4, alpha=alpha, targets=targets, seed=5)
    generator = torch.Generator().manual_seed(2)
    for name, factor in lora_state_dict(unet).items():
        if "lora_B" in name:
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
    return unet


def load_into_pipeline(unet: Any, folder: Path, file: str | None = None) -> None:
    from diffusers import StableDiffusionXLPipeline

    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipeline = StableDiffusionXLPipeline(unet=unet, **dict.fromkeys(parts))
    pipeline.load_lora_weights(folder, **({"weight_name": file} if file else {}))


@pytest.mark.slow
def test_training_starts_at_the_base_model() -> None:
    unet = sdxl_unet()
    before = predict(unet)
    add_lora(unet, rank=4, alpha=4.0, targets=ATTENTION, seed=5)
    assert torch.equal(predict(unet), before)
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert len(trainable) == len(lora_state_dict(unet))


@pytest.mark.slow
def test_initialisation_depends_on_the_seed_alone() -> None:
    def factors(seed: int, noise: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        unet = sdxl_unet(dtype)
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        add_lora(unet, rank=4, alpha=4.0, targets=ATTENTION, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return {name: factor.clone() for name, factor in lora_state_dict(unet).items()}

    first = factors(5, noise=1)
    for other in (factors(5, noise=2), factors(5, noise=1, dtype=torch.bfloat16)):
        assert all(torch.equal(first[name], other[name]) for name in first)
    changed = factors(6, noise=1)
    assert all(torch.equal(first[name], changed[name]) == ("lora_B" in name) for name in first)


@pytest.mark.slow
def test_factors_are_fp32_on_a_bf16_base_and_learn_small_updates() -> None:
    unet = trained(ATTENTION, alpha=4.0, dtype=torch.bfloat16)
    assert {factor.dtype for factor in lora_state_dict(unet).values()} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16
    assert predict(unet).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_state_dict_is_the_models_own_memory_and_resumes(tmp_path: Path) -> None:
    unet = trained(ATTENTION, alpha=3.0)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"model": lora_state_dict(unet)}, {})
    fresh = sdxl_unet()
    add_lora(fresh, rank=4, alpha=3.0, targets=ATTENTION, seed=99)
    store.newest().copy_into("model", lora_state_dict(fresh))  # type: ignore[union-attr]
    assert torch.equal(predict(fresh), predict(unet))


TARGETS = {
    "attention": ATTENTION,
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),
    "resnets": ("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    "samplers": ("downsamplers.0.conv", "upsamplers.0.conv"),
    "ends": ("conv_in", "conv_out"),
    "embeddings": (
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_both_files_give_the_trained_outputs_in_diffusers(tmp_path: Path, kind: str) -> None:
    unet = trained(TARGETS[kind], alpha=3.0)  # not the rank, and no power of two
    expected = predict(unet)
    assert not torch.equal(expected, predict(sdxl_unet()))
    save_lora(unet, tmp_path / "lora")
    for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        loaded = sdxl_unet()
        load_into_pipeline(loaded, tmp_path / "lora", file)
        assert torch.equal(predict(loaded), expected), file


@pytest.mark.slow
def test_the_folder_alone_is_enough_for_diffusers(tmp_path: Path) -> None:
    unet = trained(ATTENTION, alpha=8.0)
    save_lora(unet, tmp_path / "lora")
    loaded = sdxl_unet()
    load_into_pipeline(loaded, tmp_path / "lora")
    assert torch.equal(predict(loaded), predict(unet))


@pytest.mark.slow
def test_the_shipped_architecture_round_trips_too(tmp_path: Path, tiny_sdxl: Path) -> None:
    """One layer per block and two blocks: the block numbers come from the config, not from SDXL's sizes."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    add_lora(pipeline.unet, rank=2, alpha=3.0, targets=(*ATTENTION, "conv1", "upsamplers.0.conv"), seed=0)
    for name, factor in lora_state_dict(pipeline.unet).items():
        if "lora_B" in name:
            factor.normal_(std=0.1)
    save_lora(pipeline.unet, tmp_path / "lora")
    trained_factors = lora_state_dict(pipeline.unet)
    for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        other = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        other.load_lora_weights(tmp_path / "lora", weight_name=file)
        found = {
            name.replace(".default_0.", "."): p
            for name, p in other.unet.named_parameters()
            if "lora_" in name
        }
        assert found.keys() == trained_factors.keys()
        assert all(torch.equal(found[name], factor) for name, factor in trained_factors.items())
        scales = {m.scaling["default_0"] for m in other.unet.modules() if hasattr(m, "scaling")}
        assert scales == {1.5}


def test_kohya_file_has_original_names_and_the_true_alpha(tmp_path: Path) -> None:
    unet = trained(("to_q",), alpha=3.0)
    save_lora(unet, tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "lora_kohya.safetensors")
    layers = {name.split(".")[0] for name in state}
    assert "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_q" in layers
    assert len(state) == 3 * len(layers)
    for layer in layers:
        assert state[f"{layer}.alpha"].item() == 3.0
        assert state[f"{layer}.lora_down.weight"].shape[0] == 4
        assert state[f"{layer}.lora_up.weight"].shape[1] == 4
    with safe_open(tmp_path / "lora" / "lora_kohya.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_alpha"] == "3.0"
        assert file.metadata()["ss_network_dim"] == "4"
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_qq", "'to_qq' matches no layer of the UNet; did you mean to_q"),
        ("attn1", r"'attn1' is down_blocks\S+attn1, not a linear or convolution layer"),
        ("xyz", "matches no layer of the UNet; layers end in conv, conv1"),
        ("o_q", "did you mean to_q"),
        ("", "'' matches no layer of the UNet"),
    ],
)
def test_targets_that_match_nothing_are_refused(target: str, message: str) -> None:
    unet = sdxl_unet()
    with pytest.raises(UserError, match=message):
        add_lora(unet, rank=4, alpha=4.0, targets=("to_k", target), seed=0)
    assert lora_state_dict(unet) == {}


def test_a_layer_that_sdxl_does_not_have_is_refused_before_training() -> None:
    unet = sdxl_unet()
    unet.extra = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match="'extra' matches extra, which SDXL's UNet does not have"):
        add_lora(unet, rank=4, alpha=4.0, targets=("extra",), seed=0)


def test_a_full_disk_leaves_the_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = trained(("to_q",), alpha=4.0)
    save_lora(unet, tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mapo_fast.models.lora.write_tensors", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_lora(unet, tmp_path / "lora")
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_the_same_adapter_gives_the_same_bytes_for_whom_the_umask_says(tmp_path: Path) -> None:
    unet = trained(("to_q",), alpha=3.0)
    before = os.umask(0o022)
    try:
        for name in ("one", "two", "three"):
            save_lora(unet, tmp_path / name)
    finally:
        os.umask(before)
    files = [path.name for path in (tmp_path / "one").iterdir()]
    assert sorted(files) == ["lora_kohya.safetensors", "pytorch_lora_weights.safetensors"]
    for file in files:
        assert len({(tmp_path / name / file).read_bytes() for name in ("one", "two", "three")}) == 1
        if os.name != "nt":
            assert (tmp_path / "one" / file).stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[2, 2, 2], [1, 2, 3]])
def test_a_lora_of_a_unet_with_a_list_of_layers_loads_into_diffusers(
    tmp_path: Path, layers: list[int]
) -> None:
    unet = sdxl_unet(layers=layers)
    add_lora(unet, rank=4, alpha=2.0, targets=("to_q", "conv1", "conv"), seed=5)
    for name, factor in lora_state_dict(unet).items():
        if "lora_B" in name:
            factor.copy_(0.1 * torch.randn(factor.shape))
    save_lora(unet, tmp_path / "lora")
    base = sdxl_unet(layers=layers)
    load_into_pipeline(base, tmp_path / "lora", "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(base), predict(unet))
    if len(set(layers)) == 1:
        plain = sdxl_unet(layers=layers[0])
        load_into_pipeline(plain, tmp_path / "lora", "lora_kohya.safetensors")
        torch.testing.assert_close(predict(plain), predict(unet))
