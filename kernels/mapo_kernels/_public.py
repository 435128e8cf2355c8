"""The public names, which `mapo_kernels` gives on first use; all the operators are registered then."""

from mapo_kernels.hardware import Backend, backend
from mapo_kernels.objectives import OBJECTIVES
from mapo_kernels.ops._projections import Lora, Projection
from mapo_kernels.ops.adamw8bit import AdamW8bit
from mapo_kernels.ops.add_rounded import add_rounded_
from mapo_kernels.ops.fp8_linear import fp8_linear
from mapo_kernels.ops.frozen import (
    frozen_conv2d,
    frozen_linear,
)
from mapo_kernels.ops.geglu import geglu
from mapo_kernels.ops.geglu_linear import geglu_linear
from mapo_kernels.ops.group_norm_silu import GroupNormSilu, group_norm_silu
from mapo_kernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mapo_kernels.ops.layer_norm import LayerNorm, layer_norm
from mapo_kernels.ops.layer_norm_linear import layer_norm_linear
from mapo_kernels.ops.lora_linear import lora_linear
from mapo_kernels.ops.paired_loss import (
    NoiseTarget,
    PairedLoss,
    paired_loss,
    paired_loss_from_errors,
)
from mapo_kernels.ops.paired_noise import (
    noise_key,
    paired_noise,
    paired_noise_epsilon,
)
from mapo_kernels.weights import FrozenWeight, frozen_or_dense, join_weights

__all__ = [
    "OBJECTIVES",
    "AdamW8bit",
    "Backend",
    "FrozenWeight",
    "GroupNormSilu",
    "LayerNorm",
    "Lora",
    "NoiseTarget",
    "PairedLoss",
    "Projection",
    "add_rounded_",
    "backend",
    "fp8_linear",
    "frozen_conv2d",
    "frozen_linear",
    "frozen_or_dense",
    "geglu",
    "geglu_linear",
    "group_norm_silu",
    "group_norm_silu_conv",
    "join_weights",
    "layer_norm",
    "layer_norm_linear",
    "lora_linear",
    "noise_key",
    "paired_loss",
    "paired_loss_from_errors",
    "paired_noise",
    "paired_noise_epsilon",
]
