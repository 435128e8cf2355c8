"""The paired loss for callers who already have the errors: B scalars in plain torch, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapo_kernels._rows import FLOATING
from mapo_kernels.ops._noise import TensorOrPair
from mapo_kernels.ops._pair_checks import (
    check_reference_errors,
    check_scalars,
    check_settings,
)
from mapo_kernels.ops._pair_eager import pair_outputs
from mapo_kernels.ops._pair_kernels import PairScalars, accumulator, empty_outputs
from mapo_kernels.ops._pair_result import PairedLoss


@torch.library.custom_op(
    "mapo::paired_loss_from_errors",
    mutates_args=(),
    schema="(Tensor chosen_error, Tensor rejected_error, Tensor? reference_error, "
    "Tensor? reference_error_rejected, Tensor? weights, Tensor? labels, Tensor? baseline, str objective, "
    "float[] settings, bool per_pair) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _from_errors_op(
    chosen_error: Tensor,
    rejected_error: Tensor,
    reference_error: Tensor | None,
    reference_error_rejected: Tensor | None,
    weights: Tensor | None,
    labels: Tensor | None,
    baseline: Tensor | None,
    objective: str,
    settings: list[float],
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(chosen_error, rejected_error)
    errors = torch.cat([chosen_error.to(acc), rejected_error.to(acc)])
    reference = None
    if reference_error is not None and reference_error_rejected is not None:
        reference = torch.cat([reference_error.to(acc), reference_error_rejected.to(acc)])
    scalars = PairScalars(weights, labels, None, baseline, objective, settings, per_pair)
    loss, logits, correct, d_w, d_l = pair_outputs(errors, reference, scalars)
    return loss, logits, correct, torch.cat([d_w, d_l]).to(acc)


@_from_errors_op.register_fake
def _(
    chosen_error: Tensor,
    rejected_error: Tensor,
    reference_error: Tensor | None,
    reference_error_rejected: Tensor | None,
    weights: Tensor | None,
    labels: Tensor | None,
    baseline: Tensor | None,
    objective: str,
    settings: list[float],
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(chosen_error, rejected_error)
    out = empty_outputs(chosen_error, chosen_error.shape[0], acc, per_pair=per_pair, reference=False)
    return out.loss, out.logits, out.correct, out.coefficients


def _save_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that carry no gradient


def _from_errors_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 10
    chosen, rejected = ctx.saved_tensors[0].chunk(2)
    return (
        (grad_loss * chosen).to(ctx.dtypes[0]),
        (grad_loss * rejected).to(ctx.dtypes[1]),
        *[None] * 8,
    )


_from_errors_op.register_autograd(_from_errors_backward, setup_context=_save_slopes)


def paired_loss_from_errors(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    objective: str = "mapo_code",
    reference_errors: TensorOrPair | None = None,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    kto_baseline: Tensor | None = None,
    reduction: str = "mean",
    **settings: float,
) -> PairedLoss:
    """`paired_loss` for callers who already have the (B,) errors; differentiable in both of them.

    Errors keep more of a margin in fp32 than in half precision: a bf16 error has 3 digits, and T = 1000 or
    β = 5000 multiplies what is missing. Arguments and what it raises are those of `paired_loss`.
    """
    values = check_settings(objective, settings, reduction)
    for name, error in (("chosen_error", chosen_error), ("rejected_error", rejected_error)):
        if not isinstance(error, Tensor) or error.dtype not in FLOATING:
            raise TypeError(f"{name}: pass a floating-point tensor of shape (B,)")
        if error.ndim != 1 or error.numel() == 0:
            raise ValueError(
                f"{name}: shape {tuple(error.shape)} is not (B,) with B >= 1; reduce each sample first"
            )
    if chosen_error.shape != rejected_error.shape or chosen_error.device != rejected_error.device:
        raise ValueError(
            f"rejected_error: {tuple(rejected_error.shape)} on {rejected_error.device} does not match "
            f"chosen_error: {tuple(chosen_error.shape)} on {chosen_error.device}; both must be (B,)"
        )
    pairs, device = chosen_error.shape[0], chosen_error.device
    given = check_reference_errors(reference_errors, pairs, device)
    check_scalars(objective, pairs, device, weights, labels, kto_baseline, has_reference=given is not None)
    loss, logits, correct, _ = _from_errors_op(
        chosen_error,
        rejected_error,
        *(given or (None, None)),
        weights,
        labels,
        kto_baseline,
        objective,
        values,
        reduction == "none",
    )
    acc = logits.dtype
    reference = (None, None) if given is None else tuple(r.detach().to(acc) for r in given)
    return PairedLoss(
        loss,
        chosen_error.detach().to(acc),
        rejected_error.detach().to(acc),
        logits.detach(),
        correct,
        *reference,
    )
