"""Checks that a provider computes correctly: loss and gradients on one batch, before any time counts.

The three-way rule. The truth is the plain UNet in fp32 (fp64 at tiny size) with the objective's formula
written out. The plain UNet in the provider's own types has some error against it; the provider's may be twice
that, plus a few roundings of the type it computes in, and of the fp32 numbers that errors are: an objective
multiplies their difference by thousands, and where the plain one's cancel by chance another order of summing
may not.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers.base import Arithmetic, Objective, Provider
from bench.providers.task import Pairs, Task, adapt, fill_factors, load_unet
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.models.fp8 import use_fp8
from mapo_fast.models.quantise import quantise_base
from mapo_fast.settings.schema import ObjectiveConfig

MOST = 4096
"""Entries of each gradient that are compared, evenly spread over it."""
TWICE = 2.0
"""Two independent rounding errors of one size differ by less than this factor."""
ROUNDINGS = 8
"""Tolerance in units of finfo.eps, for the last stores and where the plain error happens to be small."""
DPO_BETA = 5000.0


class Outcome(NamedTuple):
    """Result of a forward and backward pass."""

    loss: float
    gradients: dict[str, Tensor]  # by parameter, up to MOST entries, fp64, CPU
    condition: float = 0.0
    """How a relative rounding of the errors grows in the loss: Σ |e · ∂loss/∂e| / |loss|."""


class Agreement(NamedTuple):
    """Relative errors against the truth, and their tolerances."""

    loss_error: float
    loss_allowed: float
    gradient_error: float
    gradient_allowed: float

    @property
    def good(self) -> bool:
        """Whether both errors are within tolerance; NaN is not."""
        return self.loss_error <= self.loss_allowed and self.gradient_error <= self.gradient_allowed


def check(provider: Provider) -> Agreement:
    """Compare a provider with the truth on the first batch of its task; its weights do not change."""
    task, objective = provider.task, provider.objective
    got = outcome_of(provider, provider.pairs.batch(0))
    exact = truth(task, objective)
    plain = plain_outcome(task, objective, provider.arithmetic)
    of_errors = exact.condition * torch.finfo(torch.float32).eps
    slack = ROUNDINGS * (torch.finfo(provider.arithmetic.computes_in).eps + of_errors)
    return Agreement(
        _loss_error(got, exact),
        TWICE * _loss_error(plain, exact) + slack,
        _gradient_error(got, exact),
        TWICE * _gradient_error(plain, exact) + slack,
    )


def truth(task: Task, objective: Objective) -> Outcome:
    """The plain UNet's outcome in fp32, at tiny size fp64. Kept: ask for it before the GPU is full."""
    exact = Arithmetic(torch.float64 if task.size == "tiny" else torch.float32)
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"  # TF32 rounds as fp16 does
    try:
        return plain_outcome(task, objective, exact)
    finally:
        convolutions.fp32_precision = before


def outcome_of(provider: Provider, inputs: PairInputs) -> Outcome:
    """The provider's own forward and backward pass on a prepared batch."""
    provider.watch(True)
    loss = provider.accumulate(inputs)
    gradients = {
        name.replace("_orig_mod.", ""): _sample(gradient)
        for name, p in provider.unet.named_parameters()
        if p.requires_grad and (gradient := provider.gradient(p)) is not None
    }
    provider.watch(False)
    provider.unet.zero_grad(set_to_none=True)
    return Outcome(float(loss), gradients)


@functools.cache
def plain_outcome(task: Task, objective: Objective, arithmetic: Arithmetic) -> Outcome:
    """diffusers' plain UNet in the given types; with fp8, its linear layers round, or its base is frozen."""
    inputs = Pairs(task).batch(0)
    unet = load_unet(task, arithmetic.weights)
    if arithmetic.fp8:
        use_fp8(unet)
    if arithmetic.base != "dense":
        quantise_base(unet, arithmetic.base, task.device)
    reference = None
    if task.kind == "lora":
        adapt(unet, arithmetic.factors or arithmetic.weights)
        fill_factors(unet)
    if ObjectiveConfig(name=objective).known.reference:
        if task.kind == "lora":
            unet.disable_adapters()
        with torch.no_grad(), arithmetic.context(task.device):
            reference = _errors(predict(unet, inputs), inputs)
        if task.kind == "lora":
            unet.enable_adapters()
    if task.size == "sdxl":
        unet.enable_gradient_checkpointing()
    with arithmetic.context(task.device):
        prediction = predict(unet, inputs)
    errors = _errors(prediction, inputs)
    loss = formula(errors, reference)
    (slopes,) = torch.autograd.grad(loss, errors, retain_graph=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return Outcome(
        float(loss.detach()),
        {name: _sample(p.grad) for name, p in unet.named_parameters() if p.grad is not None},
        float((slopes * errors.detach()).abs().sum() / loss.detach().abs()),
    )


def formula(errors: Tensor, reference: Tensor | None) -> Tensor:
    """MaPO in the released code's form, or Diffusion-DPO against reference errors; (2B,), chosen first."""
    e_w, e_l = errors.chunk(2)
    if reference is None:
        s_w, s_l = (0.5 * e / torch.expm1(0.5 * e) for e in (e_w, e_l))
        return e_w.mean() - 0.1 * F.logsigmoid(1000 * (s_w - s_l)).mean()
    r_w, r_l = reference.chunk(2)
    return -F.logsigmoid(-0.5 * DPO_BETA * ((e_w - r_w) - (e_l - r_l))).mean()


def _errors(prediction: Tensor, inputs: PairInputs) -> Tensor:
    """Mean squared error of each sample, in fp64."""
    return (prediction.double() - inputs.target.double()).square().flatten(1).mean(1)


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: max(1, len(flat) // MOST)][:MOST].double().cpu()


def _loss_error(got: Outcome, truth: Outcome) -> float:
    return abs(got.loss - truth.loss) / abs(truth.loss)


def _gradient_error(got: Outcome, truth: Outcome) -> float:
    """Relative error of all compared entries together; infinite where a gradient is missing."""
    if got.gradients.keys() != truth.gradients.keys():
        return float("inf")
    squares: Any = [(got.gradients[n] - g).square().sum() for n, g in truth.gradients.items()]
    norms: Any = [g.square().sum() for g in truth.gradients.values()]
    return float((sum(squares) / sum(norms)).sqrt())
