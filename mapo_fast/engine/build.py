"""From a config to the parts of a run: the UNet ready to train, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from mapo_fast.engine.compile import CompiledBlocks, refuse_without_triton
from mapo_fast.engine.flash import use_flash
from mapo_fast.engine.fp8 import refuse_without_fp8
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.offload_activations import ActivationOffload
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.engine.reference import StartModel
from mapo_fast.engine.shard import shard_unet
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.engine.transfers import Transfers
from mapo_fast.models.fp8 import use_fp8
from mapo_fast.models.lora import add_lora, add_start, lora_parameters
from mapo_fast.models.lora_file import LoraLayer
from mapo_fast.models.patch import patch_unet
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.quantise import quantise_base
from mapo_fast.settings.schema import Config, OptimConfig
from mapo_fast.util.errors import UserError


@dataclass(frozen=True)
class TrainingUnet:
    """A UNet ready to train, and what moves parts of it between host and device."""

    unet: Any
    transfers: Transfers
    weights: WeightStreaming | None
    activations: ActivationOffload | None
    compiled: CompiledBlocks | None
    start: StartModel | None = None
    """Start model that gives the reference's errors in every step."""

    def state_dict(self) -> dict[str, Tensor]:
        """The up-to-date weights; streamed ones are those in host memory."""
        return dict(self.unet.state_dict()) if self.weights is None else self.weights.state_dict()


def build_unet(
    config: Config,
    folder: Pipeline,
    precision: Precision,
    device: torch.device,
    processes: Processes = ALONE,
) -> TrainingUnet:
    """The model's UNet, ready to train on the device as the settings say."""
    start = None if folder.start is None else folder.start.parts["unet"]
    parts = prepare_unet(folder.load_unet(precision.base), config, precision, device, processes, start)
    return with_start_model(parts, config, lambda: folder.load_unet(precision.base))


def prepare_unet(
    unet: Any,
    config: Config,
    precision: Precision,
    device: torch.device,
    processes: Processes = ALONE,
    start: Mapping[str, LoraLayer] | None = None,
) -> TrainingUnet:
    """Make a UNet on the CPU ready to train: storage, adapter, kernels, attention, streaming, pair layout.

    Weights that are quantised, split or streamed go to the device layer by layer or not at all.

    Args:
        start: the factors of `adapter.start`; without them, as in a memory plan, there are new ones.
    """
    train, adapter, offload = config.train, config.adapter, config.offload
    refuse_without_fp8(config, device)
    refuse_without_triton(config, device)
    sharded = processes.shard(config)
    if adapter.base != "dense":
        quantise_base(unet, adapter.base, device)
    elif offload.weights == "gpu" and not sharded:
        unet.to(device)
    if config.speed.channels_last:
        unet.to(memory_format=torch.channels_last)
    if start is not None:
        add_start(unet, start, dtype=precision.trainable)
    elif adapter.kind == "lora":
        add_lora(
            unet,
            rank=adapter.rank,
            alpha=adapter.alpha or float(adapter.rank),
            targets=adapter.targets,
            seed=train.seed,
            dtype=precision.trainable,
        )
    _choose_kernels(unet, config)
    transfers = Transfers(device)
    weights = WeightStreaming(unet, transfers) if offload.weights == "cpu" else None
    activations = ActivationOffload(transfers) if offload.activations == "cpu" else None
    apply_layout(
        unet,
        train.layout,
        gradient_checkpointing=train.gradient_checkpointing,
        offload=activations,
        recompute_norms=config.speed.fused_ops,
    )
    compiled = CompiledBlocks(unet) if config.speed.compile else None
    if sharded:
        shard_unet(unet, device, processes.size)
    return TrainingUnet(unet.train(), transfers, weights, activations, compiled)


def with_start_model(parts: TrainingUnet, config: Config, load: Callable[[], Any]) -> TrainingUnet:
    """Add the start model that gives the reference's errors in every step, if the settings ask for it.

    Args:
        parts: the UNet, which still has its start weights.
        load: gives another UNet with the start weights, on the CPU.
    """
    if config.reference == "adapter":
        return replace(parts, start=start_of(parts.unet, config))
    if config.reference != "copy":
        return parts
    copy = load().train()  # requires_grad stays: frozen weights take another code path
    if config.offload.weights == "gpu":
        copy.to(parts.transfers.device)
    if config.speed.channels_last:
        copy.to(memory_format=torch.channels_last)
    _choose_kernels(copy, config)
    if parts.compiled is not None:
        parts.compiled.add(copy)
    weights = WeightStreaming(copy, parts.transfers) if config.offload.weights == "cpu" else None
    return replace(parts, start=StartModel(copy, weights))


def start_of(unet: Any, config: Config) -> StartModel:
    """The start model of a UNet that has not been trained yet: with a LoRA, or in a full fine-tune."""
    factors = None if config.adapter.start is None else lora_parameters(unet)
    return StartModel(unet, factors=factors)


def _choose_kernels(unet: Any, config: Config) -> None:
    if config.speed.fp8:
        use_fp8(unet)
    if config.speed.fused_ops:
        patch_unet(unet)
    if config.train.attention == "flash":
        use_flash(unet)
    elif config.train.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"train.attention = 'xformers' cannot be used ({first}); use 'sdpa'") from None


def learning_rate(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the optimizer step, by diffusers' schedules."""
    throwaway = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    schedule = get_scheduler(
        config.schedule, throwaway, num_warmup_steps=config.warmup_steps, num_training_steps=steps
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.lr * float(factor(step))
