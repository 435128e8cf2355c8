"""What the paired loss accepts; a mistake is one `ValueError` or `TypeError` naming argument and shape."""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels.objectives import OBJECTIVES

TensorOrPair = Tensor | tuple[Tensor, Tensor]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_halves(name: str, value: TensorOrPair) -> tuple[Tensor, Tensor | None]:
    """Check one (2B, …) tensor or a (chosen, rejected) tuple of (B, …) tensors by itself."""
    if isinstance(value, Tensor):
        tensors = [value]
    elif isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, Tensor) for t in value):
        tensors = list(value)
    else:
        raise TypeError(f"{name}: pass a (2B, ...) tensor or a (chosen, rejected) tuple of two tensors")
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name}: dtype {tensor.dtype} is not supported; convert it to fp16, bf16, fp32 or fp64"
            )
        if tensor.ndim < 2:
            raise ValueError(f"{name}: shape {shape} has no sample dimensions; for errors use from_errors")
        if tensor.numel() == 0:
            raise ValueError(f"{name}: shape {shape} is empty; skip the step when a batch has no pairs")
    if len(tensors) == 2:
        chosen, rejected = tensors
        if chosen.shape != rejected.shape or chosen.dtype != rejected.dtype:
            raise ValueError(
                f"{name}: chosen is {tuple(chosen.shape)} {chosen.dtype} but rejected is "
                f"{tuple(rejected.shape)} {rejected.dtype}; both halves need one shape and dtype"
            )
        return chosen, rejected
    if tensors[0].shape[0] % 2:
        raise ValueError(
            f"{name}: shape {tuple(tensors[0].shape)} has an odd batch; stack the B chosen samples first, "
            "then the B rejected ones in the same order"
        )
    return tensors[0], None


def _check_constant(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device} but prediction is on {device}; move it there")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and the loss has none for it; pass {name}.detach()")


def check_weights(weights: Tensor | None, pairs: int, device: torch.device) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.dtype not in FLOATING:
        raise TypeError("weights: pass a floating-point tensor of shape (B,), one weight per pair")
    if tuple(weights.shape) != (pairs,):
        raise ValueError(f"weights: shape {tuple(weights.shape)} does not fit {pairs} pairs; pass ({pairs},)")
    _check_constant("weights", weights, device)


def _check_mask(mask: Tensor | None, pairs: int, sample: tuple[int, ...], device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype not in (*FLOATING, torch.bool):
        raise TypeError("mask: pass a bool or floating-point tensor")
    rows = mask.shape[0] in (1, pairs, 2 * pairs) if mask.ndim else False
    if (
        mask.ndim != len(sample) + 1
        or not rows
        or any(m not in (1, s) for m, s in zip(mask.shape[1:], sample, strict=True))
    ):
        raise ValueError(
            f"mask: shape {tuple(mask.shape)} cannot be broadcast to {pairs} pairs of samples {sample}; the "
            f"first dimension must be 1, {pairs} or {2 * pairs}, every other 1 or the sample's"
        )
    _check_constant("mask", mask, device)


def check_scalars(objective: str, beta: float, snr: float, timesteps: float, reduction: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: {reduction!r} is unknown; choose "mean" or "none"')
    for name, value in (("beta", beta), ("snr", snr), ("num_train_timesteps", timesteps)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: {value} must be positive and finite")


def check_inputs(
    prediction: TensorOrPair, target: TensorOrPair, weights: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    chosen, rejected = as_halves("prediction", prediction)
    target_w, target_l = as_halves("target", target)
    pairs = chosen.shape[0] // (2 if rejected is None else 1)
    target_pairs = target_w.shape[0] // (2 if target_l is None else 1)
    if (pairs, *chosen.shape[1:]) != (target_pairs, *target_w.shape[1:]):
        raise ValueError(
            f"target: {target_pairs} pairs of {tuple(target_w.shape[1:])} do not match prediction's {pairs} "
            f"pairs of {tuple(chosen.shape[1:])}; both need the same samples in the same order"
        )
    for part in (target_w, target_l):
        if part is not None:
            _check_constant("target", part, chosen.device)
    if rejected is not None and rejected.device != chosen.device:
        raise ValueError(
            f"prediction: chosen is on {chosen.device}, rejected on {rejected.device}; move them together"
        )
    check_weights(weights, pairs, chosen.device)
    _check_mask(mask, pairs, tuple(chosen.shape[1:]), chosen.device)
    return chosen, rejected, target_w, target_l
