"""Other libraries' implementations of the ops, as providers; each returns None where its library is missing.

They are bound as their own layers use them, inputs in the form they want, so that nothing is timed that their
users would not pay.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], Any]


def _library(name: str) -> Any:
    """The module, or None where it is not installed or cannot run here."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


def stepping(optimizer: torch.optim.Optimizer) -> Call:
    """Calls of an optimizer's steps after the first one, which makes the states."""
    optimizer.step()
    return optimizer.step


def liger_geglu(projected: Tensor) -> Call | None:
    """Liger's GEGLU takes the tanh approximation, and value and gate as two tensors."""
    ops = _library("liger_kernel.ops.geglu")
    if ops is None:
        return None
    return lambda: ops.LigerGELUMulFunction.apply(*reversed(projected.chunk(2, -1)))


def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Call | None:
    ops = _library("liger_kernel.ops.layer_norm")
    if ops is None:
        return None
    return functools.partial(ops.LigerLayerNormFunction.apply, x, weight, bias, 1e-5)


def liger_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Call | None:
    """Liger has no fused SiLU."""
    ops = _library("liger_kernel.ops.group_norm")
    if ops is None:
        return None
    return lambda: F.silu(ops.LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], 32, 1e-5))


def peft_lora(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Call | None:
    peft = _library("peft.tuners.lora")
    if peft is None:
        return None
    base = torch.nn.Linear(*weight.shape[::-1], device="meta")
    base.weight, base.bias = (torch.nn.Parameter(p, requires_grad=False) for p in (weight, bias))
    config = _library("peft").LoraConfig(r=len(a), lora_alpha=len(a))
    layer = peft.Linear(base, "default", config, r=len(a), lora_alpha=len(a))
    for part, factor in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
        del part.weight
        part.weight = factor
    return functools.partial(layer, x)


def torch_adamw(parameters: list[Tensor]) -> Call:
    """PyTorch's optimizer, with moments in the parameters' dtype."""
    return stepping(torch.optim.AdamW(parameters, foreach=True))


def bitsandbytes_adamw8bit(parameters: list[Tensor]) -> Call | None:
    optim = _library("bitsandbytes.optim")
    return None if optim is None else stepping(optim.AdamW8bit(parameters))


def torchao_adamw8bit(parameters: list[Tensor]) -> Call | None:
    """The library's optimizer, with its own stochastic rounding for bf16 parameters."""
    optim = _library("torchao.optim")
    if optim is None:
        return None
    return stepping(optim.AdamW8bit(parameters, bf16_stochastic_round=parameters[0].dtype == torch.bfloat16))
