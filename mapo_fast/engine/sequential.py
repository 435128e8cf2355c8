"""The `sequential` layout: one half of a batch at a time through the whole UNet, and joint's gradients.

The loss couples the halves. With e_w,i and e_l,i the mean squared errors of pair i (`paired_loss`),

    L = 1/B · Σ_i f(e_w,i, e_l,i)        ∇L = Σ_i  c_w,i · ∇e_w,i  +  c_l,i · ∇e_l,i

    c_w,i = ∂L/∂e_w,i = 1/B · ∂f/∂e_w (e_w,i, e_l,i)        c_l,i = ∂L/∂e_l,i

so a half's gradient depends on the other half through one number per pair, and that number needs both
errors. The chosen half cannot wait for it with its activations in memory: that would be `joint`. But the
derivative is linear in it, and there are two ways around it, without any approximation:

- `scratch`: backward of the chosen sample gives s = ∇e_w,i, seeded with 1 while c_w,i is still unknown. The
  rejected sample's forward pass gives e_l,i, hence both coefficients (in closed form, `from_errors`). Then
  gradient += c_w,i · s, and the rejected backward, seeded with c_l,i, adds c_l,i · ∇e_l,i. Nothing is
  computed twice. It is exact only pair by pair: from the two sums Σ ∇e_w,i and Σ ∇e_l,i over several pairs
  no recombination gives Σ c_w,i·∇e_w,i + c_l,i·∇e_l,i, since every pair has coefficients of its own.
- the extra forward: the rejected half's errors come from a forward pass without gradients first. Then the
  chosen half knows its coefficients when it is differentiated, any number of pairs at once. It serves single
  samples too, whose coefficients may depend on all errors: halves are then any two of equal size.

Memory. `scratch` has one image's activations at a time, and a second set of gradients wherever there are
gradients already: with a first and only pair, s becomes the gradient. The extra forward has the activations
of B images and one set of gradients, for one forward pass of B images more.

A step fused into backward cannot take part: it would update weights between the halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mapo_fast.engine.gradient_sums import GradientSums
from mapo_fast.engine.layouts import has_dropout
from mapo_fast.engine.step import PairInputs, predict, sample_errors
from mapo_fast.loss import Loss, LossOutput


def sequential_backward(
    unet: Any,
    inputs: PairInputs,
    loss: Loss,
    parameters: Sequence[torch.nn.Parameter],
    *,
    weight: float,
    scratch: bool,
    scale: torch.amp.GradScaler | None = None,
    context: AbstractContextManager[Any] | None = None,
    sums: GradientSums | None = None,
    given: Mapping[str, Any] | None = None,
) -> LossOutput:
    """Add `weight` times the loss's gradients to `.grad`, with one half in memory at a time.

    Args:
        inputs: B pairs, chosen half first.
        parameters: all trained parameters of the UNet.
        weight: the micro-batch's share of the optimizer step.
        scratch: pair by pair with a second set of gradients, instead of all B pairs at once with an extra
            forward pass.
        scale: multiplies the gradients by its scale. Under `scratch` a chosen gradient has it before its
            coefficient, so it may overflow where `joint`'s does not, or the other way round.
        context: autocast of the forward passes, entered for each one.
        sums: adds gradients of the parameters; None leaves it to autograd.
        given: the loss's other inputs for all pairs: `reference_errors`, `labels`; `baseline`.

    Returns:
        The result of `loss(prediction, target)`, detached.
    """
    halves = _Halves(unet, inputs, loss, weight, scale, context or nullcontext(), sums, given or {})
    return halves.pair_by_pair(parameters) if scratch else halves.half_by_half()


@dataclass(frozen=True, eq=False)
class _Halves:
    unet: Any
    inputs: PairInputs
    loss: Loss
    weight: float
    scale: torch.amp.GradScaler | None
    context: AbstractContextManager[Any]
    sums: GradientSums | None
    given: Mapping[str, Any]

    def pair_by_pair(self, parameters: Sequence[torch.nn.Parameter]) -> LossOutput:
        pairs = len(self.inputs.noisy) // 2
        errors = torch.ones(2, pairs, dtype=self._dtype, device=self.inputs.target.device)
        for i in range(pairs):
            before = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            chosen = self._errors(slice(i, i + 1))
            self._backward(chosen)
            errors[0, i] = chosen.detach()[0]
            del chosen  # and what its graph still holds
            rejected = self._errors(slice(pairs + i, pairs + i + 1))
            errors[1, i] = rejected.detach()[0]
            c_w, c_l, out = self._coefficients(*errors)  # those of pairs to come do not matter to pair i's
            _scale_and_add(parameters, c_w[i], before, self.sums)
            self._backward(c_l[i] * rejected)
        return out

    def half_by_half(self) -> LossOutput:
        pairs = len(self.inputs.noisy) // 2
        replay = _replayable(self.inputs.noisy.device) if has_dropout(self.unet) else nullcontext
        with torch.no_grad():
            known = self._errors(slice(pairs, None))
        chosen = self._errors(slice(pairs))
        c_w, c_l, out = self._coefficients(chosen, known)
        self._backward(c_w * chosen)
        del chosen
        with replay():
            rejected = self._errors(slice(pairs, None))
        self._backward(c_l * rejected)
        return out

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.inputs.target.dtype, torch.float32)

    def _errors(self, samples: slice) -> Tensor:
        """Mean squared errors of some samples, (n,), in fp32 or the target's fp64."""
        part = PairInputs(*(x[samples] for x in self.inputs))
        with self.context:
            prediction = predict(self.unet, part)
        return sample_errors(prediction, part.target)

    def _coefficients(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
        """c_w and c_l of the module's docstring, (B,) each, with the weight; and the loss."""
        leaves = chosen.detach().requires_grad_(), rejected.detach().requires_grad_()
        out = self.loss.from_errors(*leaves, **self.given)
        c_w, c_l = torch.autograd.grad(out.loss * self.weight, leaves)
        return c_w, c_l, out._replace(loss=out.loss.detach())

    def _backward(self, terms: Tensor) -> None:
        total = terms.sum()
        with nullcontext() if self.sums is None else self.sums.adding():
            (total if self.scale is None else self.scale.scale(total)).backward()  # type: ignore[no-untyped-call]


def _scale_and_add(
    parameters: Sequence[torch.nn.Parameter],
    factor: Tensor,
    before: Sequence[Tensor | None],
    sums: GradientSums | None,
) -> None:
    """Set .grad to before + factor · .grad, in the memory of `before` where there is some."""
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
    totals, summands = [], []
    for parameter, old in zip(parameters, before, strict=True):
        if old is None:
            continue
        if parameter.grad is not None:
            totals.append(old)
            summands.append(parameter.grad)
        parameter.grad = old
    if totals:
        (torch._foreach_add_ if sums is None else sums.add)(totals, summands)


def _replayable(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A factory of contexts that start from the current random state and restore the state they found."""
    devices = [device] if device.type == "cuda" else []
    state = torch.get_rng_state()
    states = [torch.cuda.get_rng_state(d) for d in devices]

    @contextmanager
    def replay() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(state)
            for d, s in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(s, d)
            yield

    return replay
