"""The built-in optimizers, and what one has to offer for `train.fused_step`.

Their entries, with what each one can do, are in `mapo_fast/settings/optimizers.py`. Checkpoints name an
optimizer's class: the classes here have the names of those that they extend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mapo_fast.settings.schema import OptimConfig
from mapo_kernels.ops import adamw8bit as ops


class Fusable(torch.optim.Optimizer, ABC):
    """An optimizer whose entry says `fused_step`: it can take a step with some of its parameters."""

    shared_states: tuple[str, ...] = ()
    """Names of states that all parameters share; they stay on the device when states are offloaded."""

    @abstractmethod
    def initial_state(self, parameter: Tensor) -> dict[str, Any]:
        """The state that the first step would make, so that a run can allocate it before it starts."""

    @abstractmethod
    def update_group(self, parameters: Sequence[Tensor], skip: Tensor, divisor: Tensor | None) -> None:
        """Take a step with some parameters, whose states are there.

        Args:
            parameters: n parameters that have a gradient; the others have none.
            skip: (n,) fp32 on the device; where it is not 0, the parameter and its state stay as they are.
            divisor: 0-d fp32 on the device that the gradients are divided by first; None leaves them.
        """


def adamw(parameters: list[torch.nn.Parameter], config: OptimConfig, seed: int) -> AdamW:
    """torch's fused AdamW."""
    return AdamW(parameters, fused=True, **_adam(config))


def adamw8bit(parameters: list[torch.nn.Parameter], config: OptimConfig, seed: int) -> AdamW8bit:
    """Our AdamW with 8-bit moments."""
    return AdamW8bit(parameters, seed=seed, max_update_rms=config.max_update_rms, **_adam(config))


def adafactor(parameters: list[torch.nn.Parameter], config: OptimConfig, seed: int) -> Adafactor:
    """torch's Adafactor, with its own settings except lr and weight decay.

    It has no first moment, clips each tensor's update to RMS 1, and multiplies lr by the weights' RMS, so it
    needs a far larger lr than AdamW.
    """
    return Adafactor(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _adam(config: OptimConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}


class AdamW(torch.optim.AdamW, Fusable):
    """torch's fused AdamW; it takes `found_inf` and `grad_scale` on the device."""

    def initial_state(self, parameter: Tensor) -> dict[str, Any]:
        """As `Fusable.initial_state`."""
        step = parameter.detach().new_zeros((), dtype=torch.float32)
        moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **moments}

    @cached_property
    def _group_of(self) -> dict[Tensor, dict[str, Any]]:
        return {p: group for group in self.param_groups for p in group["params"]}

    def update_group(self, parameters: Sequence[Tensor], skip: Tensor, divisor: Tensor | None) -> None:
        """Run torch's fused step tensor by tensor, because it takes one skip flag per call."""
        states = [self.state[p] for p in parameters]
        torch._foreach_add_([state["step"] for state in states], list((1 - skip).unbind()))
        for p, state, flag in zip(parameters, states, skip.unbind(), strict=True):
            settings = self._group_of[p]
            assert p.grad is not None
            torch._fused_adamw_(
                [p],
                [p.grad],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [state["step"]],
                lr=settings["lr"],
                beta1=settings["betas"][0],
                beta2=settings["betas"][1],
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=flag,
            )


class AdamW8bit(ops.AdamW8bit, Fusable):
    """Our AdamW with 8-bit moments; it waits for nothing on the host."""

    shared_states = ("qmap1", "qmap2")
    states_by_memory_order = True
    """States belong to a parameter's elements by their order in memory."""
    lr_dtype = torch.float64
    """Dtype of a learning rate that is a tensor."""
    divides_always = True
    """`grad_scale` also works next to a gradient scaler and for fp64 gradients."""

    def initial_state(self, parameter: Tensor) -> dict[str, Any]:
        """As `Fusable.initial_state`."""
        return ops.new_state(parameter)

    def update_group(self, parameters: Sequence[Tensor], skip: Tensor, divisor: Tensor | None) -> None:
        """As `Fusable.update_group`."""
        self.found_inf, self.grad_scale = skip, divisor  # type: ignore[assignment]
        self.step_part(parameters)


class Adafactor(torch.optim.Adafactor, Fusable):
    """torch's Adafactor, which reads every tensor's norms on the host; the skip flags are read there too."""

    def initial_state(self, parameter: Tensor) -> dict[str, Any]:
        """As `Fusable.initial_state`."""
        step = torch.tensor(0.0)  # torch reads it on the host
        if parameter.dim() < 2:
            return {"step": step, "variance": torch.zeros_like(parameter, requires_grad=False)}
        *others, rows, columns = parameter.shape
        zeros = parameter.detach().new_zeros
        return {"step": step, "row_var": zeros((*others, rows, 1)), "col_var": zeros((*others, 1, columns))}

    def update_group(self, parameters: Sequence[Tensor], skip: Tensor, divisor: Tensor | None) -> None:
        """As `Fusable.update_group`."""
        if divisor is not None:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
        for p, skipped in zip(parameters, skip.tolist(), strict=True):
            if skipped:
                p.grad = None
        self.step()  # type: ignore[no-untyped-call]
