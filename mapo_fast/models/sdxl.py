"""Facts specific to Stable Diffusion XL, in one place for the rest of the package.

Parts      a pipeline folder has one UNet, one VAE, two text encoders with a tokenizer each, and a scheduler.
Text       a prompt's embedding is the penultimate hidden state of both encoders, side by side; the pooled
           embedding is the second one's.
Sizes      a latent stands for 8 × 8 pixels; six numbers tell the UNet an image's size, crop and target
           size.
UNet       which inputs it takes, and in which order its modules run.
Originals  what Stability AI's own code, and with it single files and LoRAs, call the UNet's layers.

Names in kohya's LoRA files: kohya's scripts train SDXL on a UNet with the original block names and match keys
exactly, so a key must read `lora_unet_input_blocks_4_1_…`, not `lora_unet_down_blocks_1_attentions_0_…`.
ComfyUI builds its key map from the original names too (and from diffusers'), A1111 replaces `lora_unet` by
`diffusion_model` and looks the rest up, diffusers maps original names back by the UNet's
`layers_per_block`. The original names are therefore the ones that load everywhere.

torch and diffusers are imported where they are needed: names and numbers need neither.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

# Parts

Component = Literal["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
Which = Literal[1, 2]
"""Number of a text encoder, or of its tokenizer."""
BOTH: tuple[Which, ...] = (1, 2)

WEIGHTS: dict[str, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Parts with weights → first part of their files' names."""
CONFIGS: dict[str, str] = {
    **dict.fromkeys(WEIGHTS, "config.json"),
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
"""All parts → the file that describes each."""
ENCODERS: tuple[Component, ...] = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""The parts that a cache of latents and embeddings depends on."""


def text_encoder(which: Which) -> Component:
    """The folder of a text encoder."""
    return "text_encoder" if which == 1 else "text_encoder_2"


def tokenizer(which: Which) -> Component:
    """The folder of a text encoder's tokenizer."""
    return "tokenizer" if which == 1 else "tokenizer_2"


def pipeline_index(scheduler: str, zeros_for_empty_prompt: bool) -> dict[str, Any]:
    """`model_index.json` of a pipeline folder.

    Args:
        scheduler: class that diffusers samples with.
        zeros_for_empty_prompt: whether the unconditional prompt has zero embeddings.
    """
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": zeros_for_empty_prompt,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def pipeline_class() -> Any:
    """diffusers' pipeline."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline


def sampling_pipeline(unet: Any, scheduler: Any) -> Any:
    """diffusers' pipeline for latents from given embeddings, so that it needs no other part."""
    parts = dict.fromkeys(ENCODERS)
    return pipeline_class()(**parts, unet=unet, scheduler=scheduler, add_watermarker=False)


# Text

CONTEXT = 77
"""Positions of a text encoder."""
CHUNK_TOKENS = CONTEXT - 2
"""Tokens of text between the start and the end token."""


def encode_text(encoder: Any, ids: Tensor, which: Which) -> tuple[Tensor, Tensor | None]:
    """One text encoder's part of the conditioning.

    Args:
        encoder: `CLIPTextModel` (1) or `CLIPTextModelWithProjection` (2).
        ids: (N, 77) int64 on the encoder's device.
        which: encoder 1 or 2.

    Returns:
        Hidden states (N, 77, width); the pooled embedding (N, P) of encoder 2, None of encoder 1.
    """
    out = encoder(ids, output_hidden_states=True)
    return out.hidden_states[-2], out[0] if which == 2 else None


# Sizes

LATENT = 8
"""Pixels, each way, that one latent stands for."""
TIME_IDS = 6
"""Original size, crop and target size; the refiner has five: an aesthetic score in place of the last two."""


def time_ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> tuple[float, ...]:
    """The UNet's size inputs: `(height, width)` and `(top, left)` in pixels.

    When sampling, original and target size are the size of the picture, and nothing is cropped.
    """
    return tuple(map(float, (*original, *crop, *target)))


def pooled_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled text embedding that a UNet with this config takes."""
    embedded = TIME_IDS * int(config["addition_time_embed_dim"])
    return int(config["projection_class_embeddings_input_dim"]) - embedded


# UNet


def predict(
    unet: Any,
    noisy: Tensor,  # (N, C, h, w)
    timesteps: Tensor,  # (N,)
    prompt_embeds: Tensor,  # (N, S, D)
    pooled_embeds: Tensor,  # (N, P)
    time_ids: Tensor,  # (N, 6) fp32
) -> Tensor:
    """The UNet's prediction, (N, C, h, w) in the type of its weights.

    Time ids stay in fp32: bf16 would round sizes above 512 to multiples of 4. Everything else follows the
    weights' type.
    """
    dtype = unet.conv_in.weight.dtype
    return unet(  # type: ignore[no-any-return]
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=prompt_embeds.to(dtype),
        added_cond_kwargs={"text_embeds": pooled_embeds.to(dtype), "time_ids": time_ids},
        return_dict=False,
    )[0]


def execution_order(unet: Any) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a `UNet2DConditionModel` that run once each, in execution order."""
    names = {module: name for name, module in unet.named_modules()}
    for module in _execution_order(unet):
        yield names[module], module


def _execution_order(unet: Any) -> Iterator[nn.Module]:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    yield unet.time_embedding
    if unet.config.addition_embed_type is not None:
        yield unet.add_embedding
    yield unet.conv_in
    for block in filter(None, (*unet.down_blocks, unet.mid_block, *unet.up_blocks)):
        attentions = getattr(block, "attentions", ())  # the middle has one less than ResNet blocks
        for module in itertools.chain.from_iterable(itertools.zip_longest(block.resnets, attentions)):
            if isinstance(module, Transformer2DModel):
                yield from (module.norm, module.proj_in, *module.transformer_blocks, module.proj_out)
            elif module is not None:
                yield module
        yield from getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ()
    yield from (unet.conv_norm_out, unet.conv_out)


# LoRA

KOHYA_METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}
"""Metadata by which a LoRA file names its base model."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def kohya_name(layer: str, layers: Sequence[int]) -> str:
    """The kohya name of a layer of diffusers' SDXL UNet, with SDXL's original block numbers.

    Args:
        layer: as diffusers names the module.
        layers: as `original_layer`.

    Raises:
        KeyError: not a layer of that UNet.
    """
    return "lora_unet_" + original_layer(layer, layers).replace(".", "_")


def original_layer(layer: str, layers: Sequence[int]) -> str:
    """The original code's name of a layer of diffusers' SDXL UNet.

    The original UNet numbers its blocks through: block 0 is the first convolution, and every diffusers down
    block is its residual layers and a downsampler; an up block has one layer more and keeps its upsampler in
    the last.

    Args:
        layer: as diffusers names the module.
        layers: residual layers of each down block (`residual_layers`); up blocks have them in reverse.

    Raises:
        KeyError: not a layer of that UNet.
    """
    if match := _BLOCK.fullmatch(layer):
        side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        before, last = _numbered(layers if side == "down" else layers[::-1], block)
        first = before + (1 if side == "down" else 0)
        place = f"{'input' if side == 'down' else 'output'}_blocks"
        if kind == "resnets":
            return f"{place}.{first + index}.0.{_RESNET[rest]}"
        if kind == "attentions":
            return f"{place}.{first + index}.1.{rest}"
        if kind == "downsamplers":
            return f"{place}.{first + last}.0.op"
        return f"{place}.{first + last}.2.{rest}"
    if match := _MIDDLE.fullmatch(layer):
        kind, index, rest = match[1], int(match[2]), match[3]
        if kind == "resnets":
            return f"middle_block.{2 * index}.{_RESNET[rest]}"
        return f"middle_block.1.{rest}"
    return _OUTSIDE[layer]


def residual_layers(config: Mapping[str, Any]) -> list[int]:
    """Residual layers of each down block: diffusers' `layers_per_block` is one number for all, or a list.

    Args:
        config: the UNet's config.
    """
    stated, blocks = config.get("layers_per_block", 2), len(config["down_block_types"])
    return [stated] * blocks if isinstance(stated, int) else list(stated)


def _numbered(layers: Sequence[int], block: int) -> tuple[int, int]:
    """For a diffusers block: the number of original blocks before it, and that of its own last one."""
    if block >= len(layers):
        raise KeyError(block)
    return sum(count + 1 for count in layers[:block]), layers[block]
