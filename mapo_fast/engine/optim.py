"""Optimizers with one guard: a step whose gradients are not finite changes nothing and is counted.

The flag stays on the device. An optimizer that supports torch's gradient scalers by itself (torch's fused
ones, our AdamW8bit) takes it as `found_inf` and turns the update into a no-op without the host ever waiting;
others, such as torch's Adafactor, have no such input, so there the host reads the flag once per step.

`fused_step.FusedStep` has the same interface and takes the step during backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mapo_fast.engine.optim_state import flatten_optimizer_state, restore_optimizer_state
from mapo_fast.engine.optimizers import Fusable
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import OptimConfig
from mapo_kernels.objectives import resolve


def build_optimizer(
    config: OptimConfig, parameters: list[torch.nn.Parameter], *, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer that a config names, over these parameters; `seed` is for stochastic rounding.

    Raises:
        TypeError: the built object is not what its entry says.
    """
    known = OPTIMIZERS[config.name]
    optimizer = resolve(known.build)(parameters, config, seed)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{known.build} returned no torch.optim.Optimizer but {type(optimizer).__name__}")
    if known.fused_step and not isinstance(optimizer, Fusable):
        raise TypeError(
            f"{type(optimizer).__name__} is no mapo_fast.engine.optimizers.Fusable, which the entry of "
            f"{config.name!r} promises by fused_step = True"
        )
    return optimizer


def norms(gradients: list[Tensor]) -> Tensor:
    """(n,) norms of n gradients, in fp32 (fp64 for fp64 gradients): bf16 would be up to 0.4 % off."""
    dtype = torch.promote_types(torch.float32, max((g.dtype for g in gradients), key=lambda d: d.itemsize))
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype))


class GuardedOptimizer:
    """Clips, checks and applies one step's gradients.

    `skipped` and `skipped_in_a_row` are 0-d fp32 tensors on the device, read only when a line is logged.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[torch.nn.Parameter],
        *,
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.max_grad_norm = max_grad_norm if max_grad_norm > 0 else float("inf")
        self.scaler = scaler
        self._takes_flags = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        # It divides as it reads the gradients: no pass over them, no rounding of what is clipped. torch's has
        # that for gradient scalers, which use it themselves, and reads an fp64 divisor wrongly on the CPU.
        self._divides = self._takes_flags and (
            getattr(optimizer, "divides_always", False)
            or (scaler is None and all(p.dtype != torch.float64 for p in self.parameters))
        )
        device = self.parameters[0].device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a 0-d loss, scaled if the run has a gradient scaler."""
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        """Apply the accumulated gradients and clear them; returns the 0-d gradient norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._norm()
        if self._divides:
            excess = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
            self.optimizer.grad_scale = excess  # type: ignore[attr-defined]
        else:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        bad = (~torch.isfinite(norm)).to(torch.float32)
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)  # in place: a captured step finds it where it was
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self._takes_flags:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _norm(self) -> Tensor:
        each = norms([p.grad for p in self.parameters if p.grad is not None])
        return torch.linalg.vector_norm(each)  # type: ignore[no-any-return]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs: tensors by name, not copied, and a dict for JSON."""
        tensors, description = flatten_optimizer_state(self.optimizer)
        return tensors, {
            "optimizer": description,
            "skipped": float(self.skipped),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def restore(self, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, or a `FusedStep`'s.

        Raises:
            UserError: the state belongs to another optimizer or other parameters.
        """
        restore_optimizer_state(self.optimizer, tensors, state["optimizer"])
        self.skipped.fill_(state["skipped"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
