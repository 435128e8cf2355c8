"""The configuration of `mapo-fast prepare` and `mapo-fast train`: one TOML file for both commands.

Each section is a frozen pydantic model; the text under a field is its documentation. However a `Config` is
made (the constructor, `model_validate`, `model_copy`), its values are in range and work together, and open
settings are completed (`rules.py`). A mistake in a file (`load.py`) or in the arguments of `Config(...)`
becomes one `UserError` that names the key and the nearest valid one (`mistakes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mapo_fast.settings.declare import OneOf, Source, rows, setting
from mapo_fast.settings.given import as_json, user_path
from mapo_fast.settings.mistakes import mistakes
from mapo_fast.settings.optimizers import REMOVED, optimizer_names
from mapo_fast.settings.rules import NAMES, completed
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import parse_size
from mapo_kernels.objectives import (
    OBJECTIVES,
    Objective,
    objective_key,
    objective_names,
    setting_names,
)

if TYPE_CHECKING:
    from typing import Self

_EVERY = 10**9
"""The largest interval in steps: longer than any run, for people who write «never» as a large number."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, values validated."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        revalidate_instances="always",
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The section with some values replaced, checked again; `deep` changes nothing, as all is immutable.

        Raises:
            pydantic.ValidationError: the values do not work.
        """
        stated = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**stated, **(update or {})})


def _mistake(text: str) -> PydanticCustomError:
    """An error whose text names its settings itself."""
    return PydanticCustomError("whole_message", "{text}", {"text": text})


class ModelConfig(Section):
    """`[model]`: the SDXL model to start from."""

    path: Path = setting(affects="inputs")
    """A single `.safetensors` file, or a diffusers pipeline folder with `model_index.json`."""
    unet: Path | None = setting(None, affects="inputs")
    """Another UNet, a folder or a `.safetensors` file."""
    vae: Path | None = setting(None, affects="inputs")
    """Another VAE, a folder or a `.safetensors` file, for instance one that does not overflow in fp16."""
    lora: tuple[str, ...] = setting((), affects="inputs")
    """LoRA files that are added to the model before anything else, each `"FILE"` or `"FILE=WEIGHT"`."""
    base: Path | None = setting(None, affects="inputs")
    """A model with the text encoders or the VAE that a single file lacks."""
    tokenizers: Path | None = setting(None, affects="inputs")
    """A folder with `tokenizer/` and `tokenizer_2/`, as a pipeline has them; without it the model's own, and
    CLIP's for a single file."""


class DataConfig(Section):
    """`[data]`: where the preference pairs are and how `prepare` turns them into a cache."""

    source: Path | None = setting(None, affects="inputs")
    """Pick-a-Pic parquet file or folder, Hugging Face dataset folder, folder with `pairs.jsonl`, or
    `chosen/` + `rejected/` folders; or single images with labels, for `kto`. Needed by `prepare` only."""
    pair_by: Literal["name", "order", "prompt"] = setting("name", affects="inputs")
    """Which files of two folders are a pair: those with equal names; the first and the first, the second and
    the second in the `order` of their numbers, which `prepare` shows and asks to confirm by `--yes`; or those
    with one `prompt` in their metadata, as A1111 and ComfyUI write it."""
    default_caption: str | None = setting(None, affects="inputs", min_length=1, max_length=2000)
    """The prompt of images that have no caption, or a blank one; without it they are skipped and listed."""
    cache: Path = setting(affects="inputs")
    """Folder of the cache that `prepare` writes and `train` reads."""
    resolution: int = setting(1024, affects="cache", ge=16, le=4096, multiple_of=8)
    """Side in pixels of the square whose area every aspect bucket keeps."""
    bucket_step: int = setting(64, affects="cache", ge=8, le=4096, multiple_of=8)
    """Bucket sides are multiples of this many pixels."""
    max_crop: float = setting(0.2, affects="cache", ge=0.0, lt=1.0)
    """A pair that would lose more than this share of an image's area to cropping is skipped and listed."""
    flip: bool = setting(False, affects="cache")
    """Also encode mirrored images; training then draws the flip per pair."""
    size_conditioning: Literal["shared", "own"] = setting("shared", affects="cache")
    """`shared`: both images of a pair get the same time ids, so size cannot leak the label."""
    max_tokens: Literal[77, 150, 225] = setting(77, affects="cache")
    """Longest prompt kept, in tokens; longer ones are truncated and listed."""
    held_out: float = setting(0.05, affects="inputs", ge=0.0, le=0.5)
    """Share of pairs kept out of training, split by prompt and image content, never by row."""
    max_skipped: float = setting(0.2, affects="bookkeeping", ge=0.0, le=1.0)
    """`prepare` stops when more than this share of the rows has to be skipped, whatever the reason; ties and
    rows without a label count too (Pick-a-Pic v2 has about an eighth of them)."""
    vae_dtype: Literal["fp32", "bf16"] = setting("fp32", affects="cache")
    """Precision of VAE encoding; a latent that comes out NaN is encoded again in fp32."""
    vae_tiling: bool = setting(False, affects="cache")
    """Encode images larger than 512 × 512 pixels in overlapping tiles. That takes a quarter of the memory at
    1024² and changes latents, `prepare` says by how much: keep it off where one image fits."""
    batch_size: int = setting(1, affects="execution", ge=1, le=1024)
    """Images per VAE call; at 1024² in fp32 each one needs 2.5 GiB."""

    @model_validator(mode="after")
    def _bucket(self) -> DataConfig:
        if self.bucket_step > self.resolution:
            raise _mistake(
                f"data.bucket_step = {self.bucket_step} is larger than data.resolution = {self.resolution}: "
                f"set data.bucket_step to {self.resolution} or a divisor of it"
            )
        return self


class ObjectiveConfig(Section):
    """`[objective]`: the loss.

    An objective takes the settings that its entry in `mapo_kernels.OBJECTIVES` names; one that is left out
    has the default there. The settings below are those of this package's objectives; an objective from
    elsewhere may bring others.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    name: Annotated[str, AfterValidator(OneOf(objective_names))] = setting("mapo", affects="arithmetic")
    """`mapo`, or `sft` (the chosen image's denoising error alone) as a control; `dpo` (Diffusion-DPO) and the
    others as in `mapo_kernels.objectives`. `smpo` needs soft labels in the data. `kto` (Diffusion-KTO) learns
    from single images, each with a label, and no other does. `npo` is `dpo` with chosen
    and rejected exchanged: its result is the negative model of guidance."""
    form: Literal["code", "paper"] = setting("code", affects="arithmetic")
    """MaPO as in the authors' released code, or as in the paper; they are not the same objective."""
    reading: Literal["power", "scale"] = setting("power", affects="arithmetic")
    """How the `paper` form's φ_β is read: (x/(eˣ−1))^β, or β·x/(eˣ−1)."""
    beta: float | None = setting(None, affects="arithmetic")
    """Weight of the margin. `mapo`: 0.1 (`code`), or the paper's β, which has no default there: it used 8 for
    general preference, 32 culture, 64 safety and style, 1024 personalisation. `dpo` 5000, `npo` 2000."""
    snr: float | None = setting(None, affects="arithmetic")
    """`mapo`: λ of the `code` form's score s(x) = λx / (e^{λx} − 1), 0.5."""
    gamma: float | None = setting(None, affects="arithmetic")
    """`simpo`, `cpo`: the margin that a pair should have."""
    alpha: float | None = setting(None, affects="arithmetic")
    """`dmpo`: assumed fraction of mislabelled pairs."""
    eta: float | None = setting(None, affects="arithmetic")
    """`linear_dpo`: pair weights are clamped to [eta, 1 − eta]."""
    desirable_weight: float | None = setting(None, affects="arithmetic")
    """`kto`: weight of wanted images, 1."""
    undesirable_weight: float | None = setting(None, affects="arithmetic")
    """`kto`: weight of unwanted images, 1."""
    reference: Literal["auto", "adapter", "copy", "precomputed"] = setting("auto", affects="execution")
    """The frozen start model that the objective compares with. `adapter`: the LoRA switched off, or with the
    factors of adapter.start. `copy`: a second UNet, in system RAM where offload.weights is. `precomputed`:
    its errors for every draw of the run, computed before the first step and kept in the run's folder. `auto`
    is `adapter` with a LoRA and `precomputed` for a full fine-tune."""

    @property
    def kernel(self) -> str:
        """The objective's key in `OBJECTIVES`."""
        return objective_key(self.name, form=self.form, reading=self.reading)

    @property
    def known(self) -> Objective:
        """The objective's entry in `OBJECTIVES`."""
        return OBJECTIVES[self.kernel]

    @property
    def takes(self) -> list[str]:
        """Names of the settings that a config may set."""
        return [name for name, setting in self.known.settings.items() if setting.role == "free"]

    @property
    def settings(self) -> dict[str, float]:
        """The objective's settings that are set."""
        stated = {name: getattr(self, name, None) for name in setting_names()}
        return {name: float(value) for name, value in stated.items() if value is not None}

    @model_validator(mode="after")
    def _no_other_keys(self) -> ObjectiveConfig:
        for name in self.model_extra or ():
            if name not in setting_names():
                raise PydanticCustomError("unknown_setting", "{key} is not a setting", {"key": name})
        return self


class AdapterConfig(Section):
    """`[adapter]`: full fine-tune or LoRA."""

    kind: Literal["full", "lora"] = setting("lora", affects="arithmetic")
    """`full` trains every UNet weight; `lora` trains low-rank factors on a frozen UNet."""
    rank: int = setting(16, affects="arithmetic", ge=1, le=2048)
    """LoRA rank r. SDXL's widest layers are whole at 1280: more adds memory and nothing else."""
    alpha: float | None = setting(None, affects="arithmetic", gt=0.0, le=1e6)
    """LoRA scale is alpha / rank; None means alpha = rank."""
    targets: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"), affects="arithmetic", min_length=1
    )
    """Names (suffixes) of the UNet layers that get an adapter."""
    start: Path | None = setting(None, affects="inputs")
    """A LoRA to train further, in a format that `model.lora` reads. Rank, alpha and targets are its own. The
    reference of an objective is then base + LoRA. The LoRA's part for text encoders is applied by `prepare`
    and written unchanged with the result."""
    base: Literal["dense", "int8", "nf4", "fp8"] = setting(
        "dense", affects=("arithmetic", "reference"), planned="last"
    )
    """Storage of the frozen UNet under a LoRA: in `train.precision`'s type, or the linear layers quantised
    to int8 or nf4 by bitsandbytes, and the convolutions stored in 8 bits. `fp8` is as small as int8; its
    matrix products are in fp8 too: less exact, meant to be faster, not measured yet. For RTX 40, H100 and
    newer."""


class OptimConfig(Section):
    """`[optim]`: optimizer and learning-rate schedule."""

    name: Annotated[str, AfterValidator(OneOf(optimizer_names))] = setting(
        "adamw", affects="arithmetic", planned="last"
    )
    """torch's fused AdamW; AdamW with 8-bit states and stochastic rounding of bf16 weights; or torch's
    Adafactor."""
    lr: float = setting(1e-5, affects="arithmetic", gt=0.0, lt=1.0)
    """Peak learning rate."""
    betas: tuple[float, float] = setting((0.9, 0.999), affects="arithmetic")
    """Decay rates of the two moments."""
    eps: float = setting(1e-8, affects="arithmetic", gt=0.0, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: float = setting(1e-2, affects="arithmetic", ge=0.0, le=1e6)
    """Decoupled weight decay."""
    schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting("constant_with_warmup", affects="arithmetic")
    """A schedule of diffusers' `get_scheduler`."""
    warmup_steps: int = setting(0, affects="arithmetic", ge=0, le=10**7)
    """Optimizer steps of linear warm-up."""
    max_grad_norm: float = setting(1.0, affects="arithmetic", ge=0.0)
    """Global gradient-norm clip; 0 switches clipping off (the norm is still logged). With train.fused_step
    the norm of the step before decides: this step's is not known yet when its first update is made."""
    max_update_rms: float | None = setting(None, affects="arithmetic", gt=0.0)
    """`adamw8bit` only: largest root mean square of a tensor's update before lr. Needs no other tensor, so it
    is the same with and without train.fused_step."""

    @field_validator("name", mode="before")
    @classmethod
    def _there(cls, name: object) -> object:
        if isinstance(name, str) and name in REMOVED:
            raise ValueError(REMOVED[name])
        return name

    @model_validator(mode="after")
    def _ranges(self) -> OptimConfig:
        if not all(0.0 <= b < 1.0 for b in self.betas):
            raise ValueError("betas must both be in [0, 1)")
        if self.lr * self.weight_decay >= 1.0:
            raise ValueError(
                f"lr * weight_decay = {self.lr * self.weight_decay:g} must be below 1: it is the share that "
                "a step takes off every weight"
            )
        if self.schedule == "polynomial" and self.lr <= 1e-7:
            raise ValueError("schedule = 'polynomial' ends at 1e-7: lr must be above it, or use 'cosine'")
        return self


class TrainConfig(Section):
    """`[train]`: the training loop."""

    output: Path = setting(affects="bookkeeping")
    """Folder of the run: checkpoints, logs, previews, and the final model or adapter."""
    steps: int = setting(1000, affects="execution", ge=1, le=10**7)
    """Optimizer steps. Ten million of one second each are four months."""
    epochs: float | None = setting(None, affects="execution", gt=0.0, le=1e6)
    """Passes over the training pairs, instead of `steps`: a run counts its steps from them when it starts."""
    pairs_per_batch: int = setting(1, affects=("arithmetic", "reference"), ge=1, le=256)
    """Pairs in one micro-batch (two images each); `kto` takes two single images for a pair. They are in
    memory at once: for more pairs in a step raise `accumulation`."""
    accumulation: int = setting(1, affects="arithmetic", ge=1, le=2**16)
    """Micro-batches per optimizer step."""
    precision: Literal["fp32", "bf16", "fp16", "pure_bf16"] = setting(
        "bf16", affects=("arithmetic", "reference"), planned="last"
    )
    """`bf16`: bf16 arithmetic with fp32 trainable weights; `fp16`: the same with a gradient scaler, LoRA
    only; `pure_bf16`: bf16 weights without fp32 masters, for optim.name = "adamw8bit"; other optimizers lose
    small updates."""
    vram: str | None = setting(None, affects="execution")
    """GPU memory to stay within, such as "24GiB": the fastest exact plan that fits is chosen for the settings
    of the memory plan that are not in the config: layout, gradient_checkpointing, fused_step and `[offload]`.
    None takes the card's free memory. On the CPU it makes no plan: those settings then have their defaults,
    or the nearest values that work with what is in the config (`mapo_fast/settings/rules.py`)."""
    layout: Literal["joint", "split", "sequential"] = setting("split", affects="execution", planned="exact")
    """`joint`: both halves of the pair in one batch; `split`: inside each checkpointed block one after the
    other, so that transient memory is one image's; `sequential`: one after the other through the whole UNet,
    a LoRA pair by pair. All give the same gradients."""
    gradient_checkpointing: bool | tuple[str, ...] = setting(True, affects="execution", planned="exact")
    """Recompute activations in backward (non-reentrant): in all blocks, in none, or in those at or below one
    of these names, such as "down_blocks.2". `split` needs it; with false, the default layout is `joint`."""
    fused_step: bool = setting(False, affects="arithmetic", planned="exact")
    """Update weights and free gradients as soon as backward has completed them: all gradients never exist at
    once. One micro-batch per step only, in one process. True by default where offload.optimizer, or a full
    fine-tune's offload.weights, is `cpu`."""
    shard: bool = setting(False, affects="execution")
    """With several processes: split weights, gradients and optimizer states among their GPUs (FSDP2), instead
    of a whole model on each. For adapter.kind = "full" with optim.name = "adamw"."""
    attention: Literal["sdpa", "xformers", "flash"] = setting("sdpa", affects="execution")
    """Attention back end: torch's own, or that of the xformers or the flash-attn package."""
    device: Literal["auto", "cuda", "cpu"] = setting("auto", affects="execution")
    """Where to train; `auto` takes the GPU when there is one."""
    threads: int = setting(0, affects="execution", ge=0, le=1024)
    """CPU threads; 0 leaves torch's choice. Bit-identical resume on CPU needs the same number."""
    seed: int = setting(0, affects=("arithmetic", "reference"), ge=0, lt=2**62)
    """Seed of noise, timesteps, flips, caption drops, data order and LoRA initialisation."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = setting("auto", affects="arithmetic")
    """What the UNet predicts; `auto` reads the pipeline's scheduler config."""
    zero_terminal_snr: Literal["auto", "on", "off"] = setting("auto", affects="arithmetic")
    """Rescale betas to zero terminal SNR; `auto` reads the scheduler config."""
    timestep_weights: Literal["none", "min_snr"] | tuple[float, ...] = setting("none", affects="arithmetic")
    """Weight of a pair's whole loss by its noise level, for any objective. `min_snr`: min(snr, γ)/snr, with
    v-prediction min(snr, γ)/(snr + 1). Or a list such as [0.5, 1.0, 1.0, 0.5]: one weight for each of as many
    equal parts of the timesteps, from little noise to much."""
    min_snr_gamma: float = setting(5.0, affects="arithmetic", gt=0.0, le=1e6)
    """γ of `min_snr`."""
    caption_dropout: float = setting(0.0, affects=("arithmetic", "reference"), ge=0.0, le=1.0)
    """Chance that a pair's prompt is dropped, for both halves together."""
    log_every: int = setting(10, affects="bookkeeping", ge=1, le=_EVERY)
    """Optimizer steps between log lines. The host waits for the GPU only there; `adafactor` makes it wait in
    each step."""
    checkpoint_every: int = setting(500, affects="bookkeeping", ge=0, le=_EVERY)
    """Optimizer steps between checkpoints; 0 writes one at the end only."""
    export_every: int = setting(0, affects="bookkeeping", ge=0, le=_EVERY)
    """Optimizer steps between LoRA files in `exports/`, which ComfyUI and A1111 load while the run goes on; 0
    writes none. For adapter.kind = "lora"."""
    keep_checkpoints: int = setting(2, affects="bookkeeping", ge=1, le=_EVERY)
    """Checkpoints kept. If a checkpoint is a link to a folder elsewhere, only the link is removed."""
    evaluate_every: int = setting(100, affects="bookkeeping", ge=0, le=_EVERY)
    """Optimizer steps between held-out evaluations; 0 evaluates at step 0 and at the end only."""
    evaluate_pairs: int = setting(64, affects="arithmetic", ge=1, le=8192)
    """Most held-out pairs used. Two predictions of each stay in memory, 0.5 MiB at 1024²."""
    evaluate_draws: int = setting(8, affects="arithmetic", ge=8, le=1000)
    """Stratified timesteps per held-out pair, each with a fixed noise. A schedule has 1000 of them."""
    best: bool = setting(True, affects="bookkeeping")
    """Keep the best step by the held-out pairs in `best/`: the last one that ranks certainly more of them
    right than the best one before it, while the chosen images' error has not risen beyond `best_tolerance`.
    Off, with a note, where fewer than 7 prompts are held out."""
    best_tolerance: float = setting(0.1, affects="bookkeeping", ge=0.0, le=1.0)
    """Largest rise of the chosen images' held-out error that a best step may have, as a share of the start
    model's: the upper end of its 95 % interval over prompts counts."""
    patience: int = setting(0, affects="execution", ge=0, le=_EVERY)
    """End the run after so many held-out evaluations without a better best step; 0: never."""
    max_skipped_steps: int = setting(10, affects="bookkeeping", ge=0, le=_EVERY)
    """More non-finite steps in a row than this stop the run; each one is skipped and counted. Whatever it is,
    a run that skipped more than half of all its steps keeps its checkpoint, writes no result and ends with
    exit code 1."""
    wandb: str | None = setting(
        None, affects="bookkeeping", max_length=128, pattern=r"^[^\x00-\x1f/\\#?%:]+$"
    )
    """Weights & Biases project that mirrors the TensorBoard figures; needs the `wandb` extra."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise _mistake("train.steps and train.epochs both say how long the run is: leave one out")
        return self

    @field_validator("timestep_weights")
    @classmethod
    def _weights(cls, value: str | tuple[float, ...]) -> str | tuple[float, ...]:
        if not isinstance(value, str) and (not 1 <= len(value) <= 1000 or min(value) < 0 or not any(value)):
            raise _mistake("train.timestep_weights: list 1 to 1000 numbers of at least 0, not all of them 0")
        return value

    @field_validator("vram")
    @classmethod
    def _size(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                parse_size(text, "train.vram")
        except UserError as error:
            raise _mistake(str(error)) from None
        return text


class OffloadConfig(Section):
    """`[offload]`: tensors that live in pinned system memory and visit the GPU while they are needed."""

    optimizer: Literal["gpu", "cpu"] = setting("gpu", affects="execution", planned="exact")
    """Optimizer states; with `cpu` they stream in around their update, which needs train.fused_step. `cpu` by
    default where a full fine-tune's weights are."""
    weights: Literal["gpu", "cpu"] = setting("gpu", affects="execution", planned="exact")
    """UNet weights; with `cpu` they stream in block by block, forward and backward. A full fine-tune then
    needs train.fused_step and optimizer = "cpu", which become the defaults."""
    activations: Literal["gpu", "cpu"] = setting("gpu", affects="execution", planned="exact")
    """The inputs of checkpointed blocks, between forward and backward."""


class SpeedConfig(Section):
    """`[speed]`: how a step is executed. No switch but `fp8` changes what is computed, only its order of
    rounding."""

    fused_ops: bool = setting(True, affects="execution", on_cpu=False)
    """Put the fused operators into the UNet (`patch_unet`); without them it saves more for backward. A run on
    the CPU, which has no kernels for them, has false by default: there they cost time."""
    channels_last: bool = setting(False, affects="arithmetic")
    """Keep convolution weights and the activations between them in channels_last, the order of cuDNN's tensor
    core kernels."""
    compile: bool = setting(False, affects="execution")
    """Compile the transformer blocks with torch.compile: once for every width of a block, not for an aspect
    bucket. The log's `compile_s` says how long it took."""
    cuda_graph: bool = setting(False, affects="execution")
    """Capture a whole step (forward, backward, update) and replay it. For every shape of a micro-batch the
    first step runs as usual, the second is captured, and later ones cost the host one launch. Needs an NVIDIA
    GPU and
    memory: a step's buffers stay reserved for the graphs (`graph buffers` of the memory plan)."""
    fp8: bool = setting(False, affects="arithmetic")
    """Multiply the linear layers of the transformer blocks in fp8, except for their weights' gradients. Only
    for adapter.kind = "full"; a LoRA's base has adapter.base = "fp8". For RTX 40, H100 and newer. Less exact,
    meant to be faster, not measured yet."""
    prefetch: bool = setting(True, affects="execution", on_cpu=False)
    """Read the next micro-batch, draw its noise and copy it to the device while the current step runs. A run
    on the CPU has false by default: the thread costs what it hides."""


class PreviewConfig(Section):
    """`[preview]`: images sampled during training with fixed seeds."""

    prompts: tuple[str, ...] = setting((), affects="bookkeeping")
    """Prompts to sample; empty switches previews off."""
    every: int = setting(500, affects="bookkeeping", ge=0, le=_EVERY)
    """Optimizer steps between previews; 0 samples at the start and the end only."""
    seed: int = setting(0, affects="bookkeeping", ge=0, lt=2**62)
    """Seed of the start noise, which also depends on the prompt."""
    steps: int = setting(25, affects="bookkeeping", ge=1, le=1000)
    """Denoising steps; a schedule has 1000."""
    guidance: float = setting(5.0, affects="bookkeeping", ge=0.0, le=1000.0)
    """Classifier-free guidance scale."""


_LARGEST = 1e9
"""The largest value of an objective's setting; the largest in use are in the thousands."""


_PRECOMPUTED = 2**28
"""Most reference errors to compute before the first step: 1 GiB of RAM, and months of a GPU's time."""


class EmaConfig(Section):
    """`[ema]`: an average of the weights over steps, which is evaluated, previewed and exported too.

    It is kept in fp32 in system RAM: 10 GB for a full fine-tune.
    """

    half_life: float | None = setting(None, affects="arithmetic", gt=0.0, le=1e7)
    """Steps in which a step's weight in the average halves; unset: there is no average. A tenth to a fifth of
    the run is a beginning."""
    every: int = setting(10, affects="arithmetic", ge=1, le=_EVERY)
    """Optimizer steps between its updates, each by the decay 0.5^(every / half_life)."""


class ExportConfig(Section):
    """`[export]`: files of a finished run for other programs, in addition to diffusers' folders."""

    single_file: bool = setting(True, affects="bookkeeping")
    """Write a full fine-tune as `model.safetensors`, too: the whole model, for ComfyUI and A1111."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = setting("auto", affects="bookkeeping")
    """Type of that file's weights; `auto` keeps that of a single file and takes fp16 for a folder's."""
    metadata: bool = setting(True, affects="bookkeeping")
    """Write metadata into the files: what the model is, predicts and was made with, and the last preview as a
    thumbnail; no prompts, paths or users."""
    prompts: bool = setting(False, affects="bookkeeping")
    """Write the preview prompts into the model card, and prompts and the data's path into files' metadata."""
    title: str | None = setting(None, affects="bookkeeping", min_length=1, max_length=200)
    """The model's title, which programs show; by default the start model's, with the objective's name."""
    trigger: str | None = setting(None, affects="bookkeeping", min_length=1, max_length=200)
    """The trigger phrase in a LoRA's files; none by default."""


class Config(Section):
    """All settings of `prepare` and `train`; they cannot be changed, `model_copy(update=...)` makes others.

    Args:
        sections: the sections of a config file, each a dict of its keys or a section of another config, as
            in `Config(model={"path": "sdxl"}, data={"cache": "cache"}, train={"output": "run"})`.

    Raises:
        UserError: a key that is unknown (with the nearest valid one) or missing, a value of a wrong type or
            out of range, settings that contradict each other.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    adapter: AdapterConfig = AdapterConfig()
    optim: OptimConfig = OptimConfig()
    offload: OffloadConfig = OffloadConfig()
    speed: SpeedConfig = SpeedConfig()
    preview: PreviewConfig = PreviewConfig()
    ema: EmaConfig = EmaConfig()
    export: ExportConfig = ExportConfig()

    def __init__(self, **sections: Section | Mapping[str, Any]) -> None:
        table: dict[str, Any] = dict(sections)
        for row in rows(type(self)):
            part = table.get(row.section)
            if row.is_path and isinstance(part, Mapping) and isinstance(part.get(row.key), str | PurePath):
                table[row.section] = {**part, row.key: user_path(row.name, str(part[row.key]))}
        try:
            self.__pydantic_validator__.validate_json(as_json(table), strict=True, self_instance=self)
        except ValidationError as error:
            raise UserError(mistakes(error, type(self))) from None
        except ValueError as error:
            raise UserError(str(error)) from None

    # pydantic's mark of its own constructor: `parse_config` validates without this one.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    _sources: Mapping[str, Source] = PrivateAttr(default_factory=dict)
    """Sources of the settings that are set elsewhere than in a program."""

    @property
    def stated(self) -> set[str]:
        """Names (`section.key`) of the settings that are set; others have defaults or were completed."""
        return {f"{section}.{key}" for section, part in self for key in part.model_fields_set}

    @property
    def sources(self) -> dict[str, Source]:
        """Where each set value comes from."""
        return {name: self._sources.get(name, "stated") for name in self.stated}

    def from_sources(self, sources: Mapping[str, Source]) -> Self:
        """Record where the config's settings come from; returns the config."""
        copy = BaseModel.model_copy(self)
        copy._sources = dict(sources)
        return copy

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The config with some sections replaced; settings in these count as set by a program."""
        kept = {
            name: source for name, source in self._sources.items() if name.split(".")[0] not in (update or ())
        }
        return super().model_copy(update=update, deep=deep).from_sources(kept)

    @property
    def reference(self) -> Literal["adapter", "copy", "precomputed"] | None:
        """Where the reference's errors come from; None for an objective without one."""
        if not self.objective.known.reference:
            return None
        if self.objective.reference == "auto":
            return "adapter" if self.adapter.kind == "lora" else "precomputed"
        return self.objective.reference

    @model_validator(mode="after")
    def _objective(self) -> Config:
        objective, known = self.objective, self.objective.known.settings
        if objective.form == "paper" and "form" not in objective.known.named:
            raise ValueError(
                f"objective.form = 'paper' is of objective.name = 'mapo', not {objective.name!r}"
            )
        if objective.reading == "scale" and "reading" not in objective.known.named:
            raise ValueError("objective.reading = 'scale' is of objective.form = 'paper': leave it out")
        for name, value in objective.settings.items():
            if name not in objective.takes:
                of = " with objective.form = 'paper'" if objective.form == "paper" else ""
                raise ValueError(
                    f"objective.{name} is not a setting of objective.name = {objective.name!r}{of}, which "
                    f"has {', '.join(objective.takes) or 'none'}"
                )
            low, high = known[name].low, known[name].high
            if not low < value < high:
                raise ValueError(
                    f"objective.{name} = {value:g} must be "
                    + (f"greater than {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}")
                )
            if abs(value) > _LARGEST:
                raise ValueError(
                    f"objective.{name} = {value:g} must be at most {_LARGEST:g}: the loss's fp32 overflows"
                )
        for name, one in known.items():
            if one.advice and name not in objective.settings:
                raise ValueError(f"objective.{name} must be set for {one.advice}")
        if objective.reference != "auto" and self.reference is None:
            raise ValueError(
                f"objective.reference = {objective.reference!r}, but objective.name = {objective.name!r} "
                "compares with no reference model: leave it out"
            )
        train = self.train
        forwards = train.steps * train.accumulation * 2 * train.pairs_per_batch
        if self.reference == "precomputed" and forwards > _PRECOMPUTED:
            raise ValueError(
                f"objective.reference = 'precomputed' would compute {forwards:,} errors before the first "
                "step and keep them in RAM: use objective.reference = 'copy', or fewer train.steps"
            )
        if train.export_every and self.adapter.kind == "full":
            raise ValueError(
                "train.export_every writes LoRA files, and adapter.kind = 'full' has none: leave it out"
            )
        if self.adapter.start is not None and self.adapter.kind == "full":
            raise ValueError(
                "adapter.start goes on training a LoRA, and adapter.kind = 'full' has none: use model.lora"
            )
        if objective.reference == "adapter" and self.adapter.kind == "full":
            raise ValueError(
                "objective.reference = 'adapter' switches a LoRA off, and adapter.kind = 'full' has none: "
                "use 'precomputed' or 'copy'"
            )
        if objective.reference == "copy" and self.adapter.kind == "lora":
            raise ValueError(
                "objective.reference = 'copy' keeps what a LoRA without its factors is already: with "
                "adapter.kind = 'lora' use 'adapter' or 'precomputed'"
            )
        return self

    @model_validator(mode="after")
    def _complete(self) -> Config:
        """Let unset settings take values that work with the set ones; they still count as unset."""
        values = {name: getattr(getattr(self, name.split(".")[0]), name.split(".")[1]) for name in NAMES}
        for name, value in completed(values, self.stated, rows(type(self))).items():
            section, key = name.split(".")
            part = getattr(self, section)
            if getattr(part, key) != value:
                fields = {**dict(part), key: value}
                # Not validated, which would count as set; in place, as this is the object being made.
                changed = type(part).model_construct(_fields_set=part.model_fields_set, **fields)
                self.__dict__[section] = changed
        return self
