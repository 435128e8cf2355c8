"""The fields of a pipeline's JSON configs that are used here: their types and ranges, and what is refused.

Everything that can be known from the configs alone is refused here, by file and field, before a weight is
read: another kind of UNet, inputs that a training step does not give, widths that do not fit the text
encoders, a noise schedule that is not the discrete one that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mapo_fast.models.sdxl import CONTEXT, TIME_IDS
from mapo_fast.util.errors import UserError, shown

Width = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(gt=0, le=64)]
Depth = Annotated[int, Field(ge=0, le=64)]
Blocks = Annotated[list[Width], Field(min_length=1, max_length=16)]
Beta = Annotated[float, Field(gt=0, lt=1)]

LEGACY_EOS = 2
"""An `eos_token_id` of old configs, for which CLIP takes the largest id of a prompt instead."""


class Part(BaseModel):
    """Base of all parts: other fields are let through, nothing is converted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class UnetConfig(Part):
    """`unet/config.json`; defaults are those of diffusers' `UNet2DConditionModel`."""

    in_channels: Width = 4
    out_channels: Width = 4
    block_out_channels: Blocks = [320, 640, 1280, 1280]
    down_block_types: Annotated[list[str], Field(min_length=1, max_length=16)]
    up_block_types: Annotated[list[str], Field(min_length=1, max_length=16)]
    layers_per_block: Count | list[Count] = 2
    transformer_layers_per_block: Depth | list[Depth | list[Depth]] = 1
    reverse_transformer_layers_per_block: list[Depth | list[Depth]] | None = None
    attention_head_dim: Width | list[Width] = 8
    cross_attention_dim: Width | list[Width] = 1280
    norm_num_groups: Width | None = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    addition_time_embed_dim: Width
    projection_class_embeddings_input_dim: Width


class TextConfig(Part):
    """`text_encoder/config.json`; defaults are those of transformers' `CLIPTextConfig`."""

    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Count = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Width = 77
    vocab_size: Width = 49408
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    eos_token_id: Annotated[int, Field(ge=0, le=2**20)] = 49407


class VaeConfig(Part):
    """`vae/config.json`; defaults are those of diffusers' `AutoencoderKL`."""

    in_channels: Width = 3
    out_channels: Width = 3
    latent_channels: Width
    block_out_channels: Blocks
    down_block_types: list[str] = ["DownEncoderBlock2D"]
    up_block_types: list[str] = ["UpDecoderBlock2D"]
    layers_per_block: Count = 1
    act_fn: str = "silu"
    norm_num_groups: Width = 32
    scaling_factor: Annotated[float, Field(gt=0)] = 0.18215
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[Annotated[float, Field(gt=0)]] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class PipelineConfig(Part):
    """`model_index.json`."""

    force_zeros_for_empty_prompt: bool = True
    requires_aesthetics_score: bool = False


class Schedule(Part):
    """`scheduler/scheduler_config.json`: a discrete noise schedule."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Beta | None = None
    beta_end: Beta | None = None
    beta_schedule: str | None = None
    trained_betas: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False


P = TypeVar("P", bound=Part)


def checked(kind: type[P], config: Mapping[str, Any], where: Path | str) -> P:
    """The fields of `kind` in a config that was read from `where`.

    Raises:
        UserError: the first field of a wrong type or out of range, or missing.
    """
    try:
        return kind.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        raise UserError(f"{where} has no {name}, as SDXL pipelines have; copy the file from the model again")
    raise UserError(
        f"{where} has {name} = {shown(config[name])}: {first['msg'][0].lower()}{first['msg'][1:]}; copy the "
        "file from the model again"
    )


SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "TCD",
        "UniPCMultistep",
    )
)
"""diffusers' samplers of a diffusion process of discrete steps: all have one schedule of betas."""
ZERO_SNR_SCHEDULERS = SCHEDULERS - {
    f"{name}Scheduler"
    for name in (
        "DEISMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
    )
}
"""Samplers that know `rescale_betas_zero_snr`; the others ignore it."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Schedules that all samplers know."""
PREDICTIONS = ("epsilon", "v_prediction")
_OTHER_NOISE: dict[str, tuple[Any, ...]] = {
    "sigma_data": (None,),
    "rho": (None,),
    "use_flow_sigmas": (False, None),
    "flow_shift": (1.0, None),
    "shift": (1.0, None),
    "base_shift": (None,),
    "use_dynamic_shifting": (False, None),
    "timestep_type": ("discrete", None),
    "snr_shift_scale": (None,),
}
"""Fields of other noise processes, each with the values that leave the discrete one as it is."""


def check_schedule(config: Mapping[str, Any], where: Path | str) -> Schedule:
    """Check that a scheduler's config has the discrete noise schedule that training follows.

    Args:
        config: with any override already merged in.
        where: the file, for messages.

    Raises:
        UserError: another kind of scheduler, an incomplete schedule, a prediction type that is not
            trained, zero terminal SNR with epsilon-prediction or for a sampler that ignores it.
    """
    schedule, name = checked(Schedule, config, where), config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise UserError(
            f"{where} has _class_name = {shown(name)}: no discrete noise schedule that can be trained is "
            "known by that name (EDM, flow matching and consistency models have others); use a model whose "
            "scheduler is one of DDPM's kin, such as EulerDiscreteScheduler"
        )
    for field, neutral in _OTHER_NOISE.items():
        if field in config and config[field] not in neutral:
            raise UserError(
                f"{where} has {field} = {shown(config[field])}: that is another noise process than the "
                f"discrete one that can be trained here ({name} without it)"
            )
    betas = schedule.trained_betas
    if betas is not None and len(betas) != schedule.num_train_timesteps:
        raise UserError(
            f"{where} has {len(betas)} trained_betas for num_train_timesteps = "
            f"{schedule.num_train_timesteps}: there must be as many"
        )
    if betas is None and schedule.beta_schedule not in BETA_SCHEDULES:
        raise UserError(
            f"{where} has beta_schedule = {shown(config.get('beta_schedule'))}: set one of "
            f"{', '.join(BETA_SCHEDULES)}, or trained_betas"
        )
    if betas is None and schedule.beta_schedule != "squaredcos_cap_v2":
        for field in ("beta_start", "beta_end"):
            if getattr(schedule, field) is None:
                raise UserError(f"{where} has no {field}, needed for the noise schedule; copy the file again")
    if schedule.prediction_type not in PREDICTIONS:
        raise UserError(
            f"{where} has prediction_type = {shown(schedule.prediction_type)}, which cannot be trained; set "
            "train.prediction to 'epsilon' or 'v_prediction' if the model is one of these"
        )
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise UserError(
            "zero terminal SNR with epsilon-prediction cannot work: at the last timestep the input is "
            "pure noise (set train.prediction = 'v_prediction' or train.zero_terminal_snr = 'off')"
        )
    if schedule.rescale_betas_zero_snr and name not in ZERO_SNR_SCHEDULERS:
        raise UserError(
            f"{where} has _class_name = {shown(name)}, which ignores zero terminal SNR and would sample on "
            "another noise schedule than is trained: name a scheduler that knows it, such as "
            "EulerDiscreteScheduler, or set train.zero_terminal_snr = 'off'"
        )
    return schedule


def check_vae(config: Mapping[str, Any], where: Path) -> VaeConfig:
    """Check that a config is that of SDXL's kind of VAE.

    Raises:
        UserError: naming the field.
    """
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(
            f"{where} has _class_name = {shown(config.get('_class_name'))}, SDXL needs a VAE of class "
            "'AutoencoderKL'"
        )
    vae = checked(VaeConfig, config, where)
    for name in ("in_channels", "out_channels"):
        if getattr(vae, name) != 3:
            raise UserError(f"{where} has {name} = {getattr(vae, name)}: images have 3 channels, RGB")
    if vae.shift_factor:
        raise UserError(
            f"{where} has shift_factor = {vae.shift_factor}, which SDXL pipelines do not apply: this is "
            "not an SDXL VAE"
        )
    for name in ("latents_mean", "latents_std"):
        values = getattr(vae, name)
        if values is not None and len(values) != vae.latent_channels:
            raise UserError(
                f"{where} has {len(values)} numbers in {name} for latent_channels = {vae.latent_channels}: "
                "there must be as many"
            )
    if (vae.latents_mean is None) != (vae.latents_std is None):
        raise UserError(
            f"{where} has one of latents_mean and latents_std: they are used together or not at all"
        )
    return vae


def check_text(config: Mapping[str, Any], where: Path) -> TextConfig:
    """Check that a config is that of a CLIP text encoder.

    Raises:
        UserError: naming the field.
    """
    if config.get("model_type", "clip_text_model") != "clip_text_model":
        raise UserError(
            f"{where} has model_type = {shown(config['model_type'])}: SDXL's text encoders are of type "
            "'clip_text_model'"
        )
    text = checked(TextConfig, config, where)
    if text.max_position_embeddings < CONTEXT:
        raise UserError(
            f"{where} has max_position_embeddings = {text.max_position_embeddings}: prompts take {CONTEXT}"
        )
    return text


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def check_tokens(config: Mapping[str, Any], where: Path) -> None:
    """Check that a tokenizer's config has the tokens that every prompt needs.

    Raises:
        UserError: naming the token.
    """
    for name in SPECIAL_TOKENS:
        value = config.get(name, "")  # left out, it is CLIP's own
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(
                f"{where} has {name} = {shown(value)}: no prompt can be encoded without it; SDXL's "
                "tokenizers have one; copy the file from the model again"
            )


_NO_INPUT: dict[str, tuple[tuple[Any, ...], str]] = {
    "class_embed_type": ((None,), "class labels"),
    "num_class_embeds": ((None,), "class labels"),
    "encoder_hid_dim": ((None,), "another kind of text or image embeddings"),
    "encoder_hid_dim_type": ((None,), "another kind of text or image embeddings"),
    "time_cond_proj_dim": ((None,), "the guidance scale, as latent consistency models take it"),
    "attention_type": (("default", None), "boxes with their texts, as GLIGEN takes them"),
    "dual_cross_attention": ((False, None), "a second text embedding"),
    "class_embeddings_concat": ((False, None), "class labels"),
}
"""Inputs that SDXL's UNet does not have: the field that declares one, its values without it, its name."""


_PER_BLOCK = (
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "cross_attention_dim",
)
"""Fields that have a value for every block, or one for all."""


def per_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's config with a list wherever one value stands for all blocks."""
    blocks, filled = len(config["down_block_types"]), dict(config)
    for name in _PER_BLOCK:
        value = config.get(name)
        if value is not None and not isinstance(value, list):
            filled[name] = [value] * blocks
    return filled


def check_unet(
    config: Mapping[str, Any],
    where: Path,
    texts: tuple[TextConfig, TextConfig],
    latent_channels: int,
    vae: Path,
) -> UnetConfig:
    """Check that a UNet takes what a training step gives it, and nothing else.

    Args:
        config: the UNet's config.
        where: its file.
        texts: the two text encoders' configs.
        latent_channels: channels of the VAE's latents.
        vae: the VAE's folder, for messages.

    Raises:
        UserError: naming the field and what does not fit it.
    """
    root = where.parent.parent
    for name, value in (("_class_name", "UNet2DConditionModel"), ("addition_embed_type", "text_time")):
        if config.get(name) != value:
            raise UserError(
                f"{root} is not an SDXL pipeline: unet/config.json has {name} = {shown(config.get(name))}, "
                f"SDXL has {value!r}"
            )
    for name, (without, what) in _NO_INPUT.items():
        if config.get(name) not in without:
            raise UserError(
                f"{where} has {name} = {shown(config[name])}: this UNet takes {what} besides SDXL's inputs, "
                "and cannot be trained here"
            )
    unet = checked(UnetConfig, config, where)
    _check_channels(unet, where.parent, latent_channels, vae)
    blocks = len(unet.down_block_types)
    for name in _PER_BLOCK:
        _check_length(unet, name, blocks, where)
    width = sum(text.hidden_size for text in texts)
    takes = unet.cross_attention_dim
    if any(dim != width for dim in ([takes] if isinstance(takes, int) else takes)):
        refiner = "; a refiner takes the second one's alone" if takes == texts[1].hidden_size else ""
        raise UserError(
            f"{where} has cross_attention_dim = {shown(takes)}: the text encoders give "
            f"{texts[0].hidden_size} + {texts[1].hidden_size} = {width}{refiner}; they do not belong together"
        )
    embed, pooled = unet.addition_time_embed_dim, texts[1].projection_dim
    has = unet.projection_class_embeddings_input_dim
    if has != TIME_IDS * embed + pooled:
        refiner = (
            f"; {TIME_IDS - 1} × {embed} + {pooled} is a refiner's, which takes an aesthetic score"
            if has == (TIME_IDS - 1) * embed + pooled
            else ""
        )
        raise UserError(
            f"{where} has projection_class_embeddings_input_dim = {has}: a training step gives {TIME_IDS} "
            f"time ids × addition_time_embed_dim {embed} + pooled text {pooled} = {TIME_IDS * embed + pooled}"
            f"{refiner}"
        )
    return unet


def _check_channels(unet: UnetConfig, folder: Path, latent: int, vae: Path) -> None:
    channels = unet.in_channels
    if channels == 2 * latent + 1:
        raise UserError(
            f"{folder} is an inpainting UNet ({channels} input channels, the VAE's latents have "
            f"{latent}): inpainting models cannot be trained here"
        )
    if channels == 2 * latent:
        raise UserError(
            f"{folder} has {channels} input channels, twice the latents' {latent}: it takes an image next to "
            "the noise (editing or upscaling) and cannot be trained here"
        )
    for kind, has in (("input", channels), ("output", unet.out_channels)):
        if has != latent:
            raise UserError(
                f"{folder} has {has} {kind} channels, the latents of {vae} have {latent}: they do not "
                "belong together"
            )


def _check_length(unet: UnetConfig, name: str, blocks: int, where: Path) -> None:
    value = getattr(unet, name)
    if isinstance(value, list) and len(value) != blocks:
        raise UserError(
            f"{where} has {len(value)} entries in {name} for {blocks} down_block_types: there must be as many"
        )
