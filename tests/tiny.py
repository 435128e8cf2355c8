"""A very small but complete SDXL pipeline folder with random weights, made from configs in a second or two.

Every part of the real architecture is there: two CLIP text encoders and tokenizers (the second one pads with
`!`, as SDXL's does), text_time conditioning, attention, a VAE. A call gives a fresh folder.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 16
POOLED_WIDTH = 24
TIME_ID_WIDTH = 8


def make_tiny_sdxl(
    folder: Path,
    *,
    variant: str | None = None,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    force_zeros: bool = True,
    scaling_factor: float = 0.13025,
    unet_channels: tuple[int, ...] = (16, 32),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write the pipeline to `folder` and return it.

    Args:
        variant: `"fp16"` writes `*.fp16.safetensors` files only.
        prediction_type, zero_terminal_snr: go into the scheduler's config.
        force_zeros: whether the empty prompt is zeros (SDXL's default) or the encoding of "".
        scaling_factor: the VAE's.
        unet_channels: one DownBlock2D, then CrossAttnDownBlock2D for the rest.
        dtype: of the saved weights.
        seed: of the random weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations at import are not what is tested
        from diffusers import (
            AutoencoderKL,
            EulerDiscreteScheduler,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        vocabulary = write_tokenizer(folder / "tokenizer", pad=EOS)
        write_tokenizer(folder / "tokenizer_2", pad="!")
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            text = {
                "vocab_size": len(vocabulary),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 2 * TEXT_WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 77,
                "bos_token_id": vocabulary[BOS],
                "eos_token_id": vocabulary[EOS],
                "pad_token_id": vocabulary[EOS],
                "initializer_factor": 5.0,
            }
            encoder = CLIPTextModel(CLIPTextConfig(**text))
            encoder_2 = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    **(
                        text
                        | {"hidden_size": POOLED_WIDTH, "projection_dim": POOLED_WIDTH, "hidden_act": "gelu"}
                    )
                )
            )
            vae = AutoencoderKL(
                block_out_channels=(8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                norm_num_groups=4,
                latent_channels=4,
                layers_per_block=1,
                sample_size=32,
                scaling_factor=scaling_factor,
                force_upcast=False,
            )
            crossed = len(unet_channels) - 1
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=unet_channels,
                down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * crossed,
                up_block_types=("CrossAttnUpBlock2D",) * crossed + ("UpBlock2D",),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=8,
                cross_attention_dim=TEXT_WIDTH + POOLED_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=TIME_ID_WIDTH,
                projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + POOLED_WIDTH,
                use_linear_projection=True,
            )
        finally:
            torch.random.set_rng_state(state)
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_terminal_snr,
            timestep_spacing="leading",
            steps_offset=1,
        )
        pipeline: Any = StableDiffusionXLPipeline(
            vae=vae.to(dtype),
            text_encoder=encoder.to(dtype),
            text_encoder_2=encoder_2.to(dtype),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            unet=unet.to(dtype),
            scheduler=scheduler,
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder, variant=variant, safe_serialization=True)
    return folder


def write_tokenizer(folder: Path, pad: str) -> dict[str, int]:
    """Write an offline CLIP tokenizer: one token per byte, a few merges. Returns its vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>")]
    entries = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(entries)}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocabulary
