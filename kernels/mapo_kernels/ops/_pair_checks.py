"""What the paired ops accept; a mistake is one `ValueError` or `TypeError` naming argument and shape."""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_kernels._rows import FLOATING
from mapo_kernels.objectives import MOST_SETTINGS, OBJECTIVES
from mapo_kernels.ops._noise import NoiseTarget, TensorOrPair


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
        if chosen.device != rejected.device:
            raise ValueError(
                f"{name}: chosen is on {chosen.device}, rejected on {rejected.device}; move them together"
            )
        return chosen, rejected
    if tensors[0].shape[0] % 2:
        raise ValueError(
            f"{name}: shape {tuple(tensors[0].shape)} has an odd batch; stack the B chosen samples first, "
            "then the B rejected ones in the same order"
        )
    return tensors[0], None


def check_constant(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that a tensor the loss has no gradient for is on the prediction's device and asks for none."""
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device} but prediction is on {device}; move it there")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and the loss has none for it; pass {name}.detach()")


def check_per_pair(name: str, tensor: Tensor, pairs: int, device: torch.device) -> None:
    """Check a floating-point tensor of one number per pair."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: pass a floating-point tensor of shape (B,), one number per pair")
    if tuple(tensor.shape) != (pairs,):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit {pairs} pairs; pass ({pairs},)")
    check_constant(name, tensor, device)


def check_keys(keys: Tensor, pairs: int, device: torch.device) -> None:
    """Check the noise keys of a batch."""
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        raise TypeError("keys: pass an int64 tensor of shape (B,), one `noise_key` per pair")
    if tuple(keys.shape) != (pairs,):
        raise ValueError(f"keys: shape {tuple(keys.shape)} does not fit {pairs} pairs; pass ({pairs},)")
    check_constant("keys", keys, device)


def check_mask(mask: Tensor | None, pairs: int, sample: tuple[int, ...], device: torch.device) -> None:
    """Check that a mask can be broadcast to the samples."""
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
    check_constant("mask", mask, device)


def check_settings(objective: str, settings: dict[str, float], reduction: str) -> list[float]:
    """The objective's settings as the kernel takes them: given values over defaults, in order."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: {reduction!r} is unknown; choose "mean" or "none"')
    known = OBJECTIVES[objective].settings
    for name in settings:
        if name not in known:
            raise TypeError(f"{name}: {objective!r} has no such setting; it has {', '.join(known)}")
    values = []
    for name, (default, low, high, *_) in known.items():
        value = settings.get(name, default)
        if not low < value < high:
            wanted = (
                "positive and finite" if (low, high) == (0, float("inf")) else f"between {low} and {high}"
            )
            raise ValueError(f"{name}: {value} must be {wanted}")
        values.append(float(value))
    return values + [0.0] * (MOST_SETTINGS - len(values))


def check_scalars(
    objective: str,
    pairs: int,
    device: torch.device,
    weights: Tensor | None,
    labels: Tensor | None,
    kto_baseline: Tensor | None,
    *,
    has_reference: bool,
) -> None:
    """Check what a batch brings along against what its objective needs."""
    known = OBJECTIVES[objective]
    if known.reference and not has_reference:
        raise ValueError(
            f"reference_errors: {objective!r} compares with a reference model; pass its (chosen, rejected) "
            "errors, or reference_prediction"
        )
    if has_reference and not known.reference:
        raise ValueError(f"reference_errors: {objective!r} has no reference model; leave the reference out")
    if weights is not None:
        check_per_pair("weights", weights, pairs, device)
    if labels is not None:
        if known.labels == "refused":
            able = ", ".join(name for name, other in OBJECTIVES.items() if other.labels != "refused")
            raise ValueError(
                f"labels: {objective!r} has no soft labels; leave them out or choose one of {able}"
            )
        check_per_pair("labels", labels, pairs, device)
    elif known.labels == "required":
        raise ValueError(
            f"labels: {objective!r} needs them: a (B,) tensor in [0, 1], how probably the chosen sample is "
            "the better one"
        )
    if kto_baseline is not None:
        if not known.baseline:
            raise ValueError(f"kto_baseline: {objective!r} has none; leave it out")
        if not isinstance(kto_baseline, Tensor) or kto_baseline.dtype not in FLOATING:
            raise TypeError("kto_baseline: pass a floating-point tensor of one element")
        if kto_baseline.numel() != 1:
            raise ValueError(f"kto_baseline: shape {tuple(kto_baseline.shape)} is not one number")
        check_constant("kto_baseline", kto_baseline, device)
    elif known.baseline:
        raise ValueError(
            f"kto_baseline: {objective!r} needs one: a tensor of one element, the mean of r - e over the "
            "optimizer step's samples, at least 0"
        )


def check_reference_errors(
    errors: TensorOrPair | None, pairs: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The reference's errors as two (B,) tensors."""
    if errors is None:
        return None
    if isinstance(errors, Tensor) and tuple(errors.shape) == (2 * pairs,):
        errors = (errors[:pairs], errors[pairs:])
    if not isinstance(errors, (tuple, list)) or len(errors) != 2:
        raise TypeError(
            f"reference_errors: pass a (chosen, rejected) tuple of two ({pairs},) tensors, "
            f"or one tensor of shape ({2 * pairs},)"
        )
    for error in errors:
        check_per_pair("reference_errors", error, pairs, device)
    return errors[0], errors[1]


def check_prediction(prediction: TensorOrPair) -> tuple[Tensor, Tensor | None, int, tuple[int, ...]]:
    """The prediction's parts, the number of pairs and a sample's shape."""
    chosen, rejected = as_halves("prediction", prediction)
    pairs = chosen.shape[0] // (2 if rejected is None else 1)
    return chosen, rejected, pairs, tuple(chosen.shape[1:])


def _check_like(
    name: str, value: TensorOrPair, pairs: int, sample: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Check an operand of the prediction's samples that gets no gradient."""
    first, second = as_halves(name, value)
    have = first.shape[0] // (2 if second is None else 1)
    if (have, *first.shape[1:]) != (pairs, *sample):
        raise ValueError(
            f"{name}: {have} pairs of {tuple(first.shape[1:])} do not match prediction's {pairs} "
            f"pairs of {sample}; both need the same samples in the same order"
        )
    for part in (first, second):
        if part is not None:
            check_constant(name, part, device)
    return first, second


def check_target(
    target: TensorOrPair | NoiseTarget, pairs: int, sample: tuple[int, ...], device: torch.device
) -> tuple[str, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Kind, the two halves (stored or latents), keys and scales of a target."""
    if not isinstance(target, NoiseTarget):
        return "stored", *_check_like("target", target, pairs, sample, device), None, None, None
    if target.kind not in ("epsilon", "v", "flow"):
        raise ValueError(f"target.kind: {target.kind!r} is unknown; choose one of 'epsilon', 'v', 'flow'")
    check_keys(target.keys, pairs, device)
    if target.kind == "epsilon":
        return "epsilon", None, None, target.keys, None, None
    if target.latents is None:
        raise ValueError(f"target.latents: kind {target.kind!r} needs the clean (chosen, rejected) latents")
    latents = _check_like("target.latents", target.latents, pairs, sample, device)
    if target.kind == "flow":
        return "flow", *latents, target.keys, None, None
    for name, scale in (("target.alphas", target.alphas), ("target.sigmas", target.sigmas)):
        if scale is None:
            raise ValueError(f"{name}: kind 'v' needs them, one number per pair: pass a (B,) tensor")
        check_per_pair(name, scale, pairs, device)
    return "v", *latents, target.keys, target.alphas, target.sigmas


def check_reference(
    reference_prediction: TensorOrPair | None,
    reference_errors: TensorOrPair | None,
    pairs: int,
    sample: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """The reference's prediction, or its errors."""
    if reference_prediction is None:
        return None, None, check_reference_errors(reference_errors, pairs, device)
    if reference_errors is not None:
        raise ValueError("reference_errors: reference_prediction is given too; pass one of the two")
    return *_check_like("reference_prediction", reference_prediction, pairs, sample, device), None
