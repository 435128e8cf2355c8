"""SDXL's own facts against diffusers and the original code's names."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sdxl import (
    CONFIGS,
    CONTEXT,
    ENCODERS,
    WEIGHTS,
    encode_text,
    kohya_name,
    pooled_width,
    time_ids,
)


def test_a_pipeline_has_these_parts(tiny_sdxl: Path) -> None:
    """The tiny one is as diffusers saves it."""
    assert {f"{part.parent.name}/{part.name}" for part in tiny_sdxl.glob("*/*config.json")} == {
        f"{part}/{name}" for part, name in CONFIGS.items()
    }
    assert {part.parent.name for part in tiny_sdxl.glob("*/*.safetensors")} == WEIGHTS.keys()
    assert CONFIGS.keys() - {*ENCODERS} == {"unet", "scheduler"}


def test_conditioning_is_what_diffusers_gives(tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    given = {"original_size": (50, 60), "crops_coords_top_left": (1, 2), "target_size": (48, 56)}
    wanted = pipeline._get_add_time_ids(
        **given,
        dtype=torch.float32,
        text_encoder_projection_dim=pooled_width(pipeline.unet.config),
    )
    assert [*time_ids(*given.values())] == wanted[0].tolist()
    embeds, _, pooled, _ = pipeline.encode_prompt("a red cat", do_classifier_free_guidance=False)
    folder = open_sdxl(tiny_sdxl)
    found = []
    for which in (1, 2):
        tokens = folder.load_tokenizer(which)("a red cat", padding="max_length", max_length=CONTEXT)
        encoder = folder.load_text_encoder(which)
        found.append(encode_text(encoder, torch.tensor([tokens.input_ids]), which))
    assert found[0][1] is None
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]], dim=-1), embeds)
    torch.testing.assert_close(found[1][1], pooled)
    assert pooled.shape[1] == pooled_width(pipeline.unet.config)


# Pairs of SDXL's two UNet namings, from the first, the last and the odd blocks.
NAMES = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0": (
        "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0"
    ),
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
}


@pytest.mark.parametrize("layer", NAMES)
def test_kohya_names_of_sdxl(layer: str) -> None:
    assert kohya_name(layer, [2, 2, 2]) == "lora_unet_" + NAMES[layer]


def test_blocks_of_different_depth_have_names_of_their_own() -> None:
    """Blocks have the original UNet's numbers, whose `num_res_blocks` may be a list too."""
    down = {"down_blocks.0.resnets.0": 1, "down_blocks.1.attentions.2": 5, "down_blocks.2.resnets.1": 8}
    up = {"up_blocks.0.attentions.2": 2, "up_blocks.1.resnets.0": 3, "up_blocks.2.resnets.1": 8}
    for part, number in (down | up).items():
        side = "input" if part in down else "output"
        kind, rest = ("0", "conv1") if "resnets" in part else ("1", "proj_in")
        original = "in_layers.2" if kind == "0" else rest
        expected = f"{side}_blocks.{number}.{kind}.{original}".replace(".", "_")
        assert kohya_name(f"{part}.{rest}", [1, 3, 2]) == f"lora_unet_{expected}"
    assert kohya_name("down_blocks.1.downsamplers.0.conv", [1, 3, 2]) == "lora_unet_input_blocks_6_0_op"
    assert kohya_name("up_blocks.0.upsamplers.0.conv", [1, 3, 2]) == "lora_unet_output_blocks_2_2_conv"
    with pytest.raises(KeyError):
        kohya_name("down_blocks.3.resnets.0.conv1", [1, 3, 2])


def test_comfyui_knows_every_layer_under_its_kohya_name() -> None:
    """ComfyUI maps `lora_unet_` and the original name of every weight, with dots as underscores.

    The list is made by this rule from the original names that sd-mecha has.
    """
    known = set((Path(__file__).parent / "comfyui_lora_layers.txt").read_text().split())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL_UNET)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    assert len(layers) == 794
    assert {kohya_name(layer, [2, 2, 2]) for layer in layers} <= known
