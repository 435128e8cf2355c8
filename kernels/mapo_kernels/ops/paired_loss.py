"""Paired preference loss: squared errors, margin, mean loss and gradient in one launch each way.

    e_i     = mean over a sample of (prediction_i − target_i)²        or Σ m·d² / Σ m with a mask m
    r_i     = the same of a frozen reference's prediction, if an objective needs one
    loss    = 1/B · Σ_pairs weight · f(e_w, e_l, r_w, r_l)            f: see objectives.py
    grad_i  = grad_out · c_i · m · (prediction_i − target_i)          c_i = ∂loss/∂e_i · 2/N_i
                                                                      N_i = C·H·W or Σ m

Shapes. Predictions and targets are (2B, …), the B chosen samples first, or a pair of (B, …) halves, which
are read where they lie: kernels get one pointer per half, nothing is concatenated or sliced in autograd.
The kernels and how the last program of a launch comes to do the epilogue are in `_pair_kernels.py`.

The target is stored, or made again from the noise's keys (`NoiseTarget`). Then the walk is in the shape's
order instead of memory's, and four neighbours share a Philox counter.

Dtypes. Inputs are converted to fp32 on load (all to fp64 if one is fp64) and accumulated in that dtype;
errors, logits and loss are returned in it. The epilogue starts from the errors as returned, so `from_errors`
on them gives the same logits. Gradients are rounded once, to the prediction's dtype.

Saved for backward: the inputs (not the reference) and the (2B,) coefficients. Least traffic: forward reads
prediction, target and reference once; backward reads prediction and target again and writes the gradient.
Both kernels move that, plus ≤ 1 kB per sample. With an epsilon `NoiseTarget` there is no target to read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapo_kernels.hardware import backend
from mapo_kernels.ops._noise import NoiseTarget, TensorOrPair
from mapo_kernels.ops._pair_checks import (
    check_mask,
    check_prediction,
    check_reference,
    check_scalars,
    check_settings,
    check_target,
)
from mapo_kernels.ops._pair_eager import eager_backward, eager_forward
from mapo_kernels.ops._pair_from_errors import paired_loss_from_errors
from mapo_kernels.ops._pair_kernels import (
    PairScalars,
    accumulator,
    empty_outputs,
    launch_backward,
    launch_forward,
)
from mapo_kernels.ops._pair_layout import Given, split_halves
from mapo_kernels.ops._pair_reference import paired_loss_reference
from mapo_kernels.ops._pair_result import PairedLoss

__all__ = [
    "NoiseTarget",
    "PairedLoss",
    "check_settings",
    "paired_loss",
    "paired_loss_from_errors",
    "paired_loss_reference",
]


# --- Operators ---


@torch.library.custom_op(
    "mapo::paired_loss",
    mutates_args=(),
    schema="(Tensor[] prediction, Tensor?[] given, str target_kind, str objective, float[] settings, "
    "bool per_pair) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),  # see completion_counter
)
def _paired_loss_op(
    prediction: list[Tensor],  # (2B, …), or the two halves
    given: list[Tensor | None],  # `Given`
    target_kind: str,
    objective: str,
    settings: list[float],
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = Given(*given)
    operands = parts.operands(prediction, target_kind)
    scalars = PairScalars(
        parts.weights, parts.labels, parts.reference_errors, parts.baseline, objective, settings, per_pair
    )
    layout = operands.layout() if backend(prediction[0].device).name != "eager" else None
    if layout is None:
        return eager_forward(operands, scalars)
    return launch_forward(operands, scalars, layout)


@_paired_loss_op.register_fake
def _(
    prediction: list[Tensor],
    given: list[Tensor | None],
    target_kind: str,
    objective: str,
    settings: list[float],
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = Given(*given)
    return empty_outputs(
        prediction[0],
        prediction[0].shape[0] // (3 - len(prediction)),
        accumulator(prediction[0], parts.target, parts.reference),
        per_pair=per_pair,
        reference=parts.reference is not None or parts.reference_error is not None,
    )


@torch.library.custom_op(
    "mapo::paired_loss_backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor coefficients, Tensor[] prediction, Tensor?[] given, str target_kind) "
    "-> Tensor[]",
)
def _paired_loss_backward_op(
    grad_loss: Tensor,
    coefficients: Tensor,
    prediction: list[Tensor],
    given: list[Tensor | None],  # `Given` as far as `Given.kept`
    target_kind: str,
) -> list[Tensor]:
    operands = Given(*given).operands(prediction, target_kind)
    results = [torch.empty_like(p) for p in prediction]
    grads = split_halves(*results)
    layout = operands.layout(grads) if backend(prediction[0].device).name != "eager" else None
    if layout is None:
        eager_backward(grad_loss, coefficients, operands, grads)
    else:
        launch_backward(grad_loss, coefficients, operands, grads, layout)
    return results


@_paired_loss_backward_op.register_fake
def _(
    grad_loss: Tensor,
    coefficients: Tensor,
    prediction: list[Tensor],
    given: list[Tensor | None],
    target_kind: str,
) -> list[Tensor]:
    return [torch.empty_like(p) for p in prediction]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, given, ctx.target_kind, *_ = inputs
    ctx.halves = len(prediction)
    ctx.save_for_backward(output[5], *prediction, *Given(*given).kept)
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that carry no gradient


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    coefficients, *rest = ctx.saved_tensors
    prediction, given = rest[: ctx.halves], rest[ctx.halves :]
    grads: list[Tensor | None] = [None] * ctx.halves
    if grad_loss is not None:
        grads = _paired_loss_backward_op(grad_loss, coefficients, prediction, given, ctx.target_kind)
    return (grads, *[None] * 5)


_paired_loss_op.register_autograd(_backward, setup_context=_save_for_backward)


# --- Public function ---


def paired_loss(
    prediction: TensorOrPair,
    target: TensorOrPair | NoiseTarget,
    *,
    objective: str = "mapo_code",
    reference_errors: TensorOrPair | None = None,
    reference_prediction: TensorOrPair | None = None,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    kto_baseline: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    **settings: float,
) -> PairedLoss:
    """Preference loss of B (chosen, rejected) pairs from a denoiser's predictions and targets.

    Args:
        prediction: (2B, …), chosen half first, or a (chosen, rejected) tuple of (B, …) tensors; fp16, bf16,
            fp32 or fp64, any strides. Usually (2B, C, H, W).
        target: as `prediction`, in either form; its dtype may differ. Or a `NoiseTarget`, which is made again
            from its keys. It gets no gradient.
        objective: one of `OBJECTIVES`; formulas and sources in `mapo_kernels.objectives`.
        reference_errors: a frozen reference's (r_w, r_l), two (B,) tensors or one (2B,), for the objectives
            that compare with one.
        reference_prediction: instead of its errors, the reference's prediction, as `prediction`; its errors
            against the same target and mask are taken in the same launch.
        weights: (B,); multiplies each pair's whole loss. The mean still divides by B.
        labels: (B,) soft labels p in [0, 1] (not checked: that would wait for the GPU), how probably the
            chosen sample really is the better one. −logσ(z) becomes −p·logσ(z) − (1 − p)·logσ(−z); `smpo`,
            which needs them, scales its logit by 10(2p − 1). Objectives without a logσ refuse them.
        kto_baseline: one element, for `kto` only: k, the mean of r − e over all samples of the optimizer
            step, on every process, clamped at 0 from below. It is read on the device.
        mask: broadcastable to the samples, (2B or B or 1, C or 1, H or 1, W or 1), bool or floating;
            e = Σ m·d² / Σ m, a broadcast mask counted once per element. (B, …) and (1, …) serve both halves.
            A sample whose mask is all zero has no error: 0/0 = NaN. A NaN under a zero mask is still NaN.
        reduction: `"mean"` over the pairs, or `"none"`.
        **settings: the objective's scalars; names and defaults are in `OBJECTIVES[objective].settings`:
            `beta` of all, `snr` and `num_train_timesteps` of `mapo_code` (the other MaPO forms and `sft` take
            and ignore them), `desirable_weight` and `undesirable_weight` of `kto`, `alpha` of `dmpo`, `eta`
            of `linear_dpo`, `gamma` of `simpo` and `cpo`.

    Returns:
        A `PairedLoss`. NaN or Inf in a sample makes its error, its pair's logit and gradients and the mean
        loss non-finite; other pairs' outputs do not change. Nothing waits for the GPU.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting does not fit; the message names it.
    """
    values = check_settings(objective, settings, reduction)
    chosen, rejected, pairs, sample = check_prediction(prediction)
    device = chosen.device
    kind, *target_parts = check_target(target, pairs, sample, device)
    *reference, given = check_reference(reference_prediction, reference_errors, pairs, sample, device)
    has_reference = reference_prediction is not None or given is not None
    check_scalars(objective, pairs, device, weights, labels, kto_baseline, has_reference=has_reference)
    check_mask(mask, pairs, sample, device)
    scalars = weights, labels, kto_baseline
    parts = Given._make((*target_parts, mask, *reference, *(given or (None, None)), *scalars))
    loss, errors, reference_out, logits, correct, _ = _paired_loss_op(
        [chosen] if rejected is None else [chosen, rejected],
        list(parts),
        kind,
        objective,
        values,
        reduction == "none",
    )
    e_w, e_l = errors.detach().chunk(2)
    r_w, r_l = reference_out.detach().chunk(2) if has_reference else (None, None)
    return PairedLoss(loss, e_w, e_l, logits.detach(), correct, r_w, r_l)
