"""The optimizer step, fused into backward: weights are updated as soon as their gradients are complete.

A hook on each parameter collects completed gradients. When they have 64 MB (or a unit of streamed weights is
complete) they are applied and freed, so that all gradients never exist at once: of SDXL's 5.1 GB in bf16 at
most 0.13 are alive. A complete gradient means that backward needs the weight no more: the node that made it
has also made its input's gradient. Checkpointing has to be non-reentrant, where a weight that a block uses
twice completes once.

Differences from a step after backward:

- Clipping. A global norm is known only when backward ends, after the first updates. So `max_grad_norm`
  scales by the norm of the step before, the newest one that was finite; the first step is not clipped (Adam's
  first update does not depend on the gradient's scale). `optim.max_update_rms` instead clips each tensor's
  update by itself and is the same in both.
- Inf and NaN. If the loss is not finite, the whole step changes nothing, as without fusing. If only a
  gradient is not finite, its tensor is skipped and the others are updated. Both are counted on the device.

Everything else is equal bit by bit: AdamW8bit's random bits depend on the parameter's number and its step.
The optimizer itself updates a group of tensors (`optimizers.Fusable`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mapo_fast.engine.optim import norms
from mapo_fast.engine.optim_state import flatten_optimizer_state, restore_optimizer_state
from mapo_fast.engine.optimizers import Fusable
from mapo_fast.engine.stream_states import GROUP_BYTES, StateStreaming

if TYPE_CHECKING:
    from mapo_fast.engine.stream_weights import WeightStreaming


class FusedStep:
    """Applies gradients during backward; the same interface as `GuardedOptimizer`.

    `skipped` counts steps whose loss was not finite, `skipped_tensors` the tensors skipped in other steps,
    `skipped_in_a_row` the newest steps in a row with either: 0-d fp32 tensors on the device.

    Args:
        optimizer: just built.
        parameters: the optimizer's parameters, on one device.
        max_grad_norm: see the top of this file; 0 is no clipping.
        states: where the optimizer's states are streamed from.
        weights: where weights are streamed from; it is told when a unit has its new values.
        group_bytes: bytes of gradients, or of states if they are larger, that are applied together.
    """

    def __init__(
        self,
        optimizer: Fusable,
        parameters: Iterable[torch.nn.Parameter],
        *,
        max_grad_norm: float,
        states: StateStreaming | None = None,
        weights: WeightStreaming | None = None,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        self.optimizer, self.states, self.weights = optimizer, states, weights
        self.max_grad_norm, self.group_bytes = max_grad_norm, group_bytes
        self.parameters = list(parameters)
        self._bytes: dict[Tensor, int] = {p: p.numel() * p.element_size() for p in self.parameters}
        self._unit: dict[Tensor, Any] = {}
        for p in self.parameters:
            if states is None:
                optimizer.state[p].update(optimizer.initial_state(p))
            else:
                self._bytes[p] = max(self._bytes[p], states.nbytes(p))
            if weights is not None and (unit := weights.unit_of(p)) is not None:
                self._unit[p] = unit
            p.register_post_accumulate_grad_hook(self._completed)  # type: ignore[no-untyped-call]

        device = self.parameters[0].device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.skipped_tensors = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        """Gradient norm of the newest step whose norm was finite."""
        self._running = False
        self._start()

    def _start(self) -> None:
        """Prepare for a step."""
        device = self.skipped.device
        self._pending: list[Tensor] = []
        self._pending_bytes = 0
        self._open: Any = None
        """The unit of streamed weights whose gradients are coming."""
        self._missing: dict[int, int] = {}
        for unit in self._unit.values():
            self._missing[id(unit)] = self._missing.get(id(unit), 0) + 1
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=device)
        self._bad_tensors = torch.zeros((), dtype=torch.int64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._scale: Tensor | None = None
        if self.max_grad_norm > 0:
            self._scale = ((self._norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)

    def backward(self, loss: Tensor) -> None:
        """Differentiate a 0-d loss and update every parameter on the way.

        Raises:
            RuntimeError: called twice before `step`.
        """
        if self._running:
            raise RuntimeError("FusedStep: one backward a step: its gradients are applied as they come")
        self._start()
        self._running = True
        self._bad_loss = ~torch.isfinite(loss.detach())
        if self.states is not None:
            self.states.begin()
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        """Apply what is left; returns the 0-d norm of all gradients before clipping."""
        self._apply()
        self._close_unit()
        if self.states is not None:
            self.states.end()
        norm = self._squares.sqrt().float()
        norm = torch.where(self._bad_loss, torch.nan, norm)
        tensors = torch.where(self._bad_loss, 0, self._bad_tensors)
        self.skipped += self._bad_loss
        self.skipped_tensors += tensors
        # In place, as all that a step leaves to the next one: a captured step finds it where it was.
        self.skipped_in_a_row.add_(1).mul_(self._bad_loss | (tensors > 0))
        self._norm.copy_(torch.where(torch.isfinite(norm), norm, self._norm))
        self._running = False
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs: tensors by name, not copied, and a dict for JSON."""
        if self.states is not None:
            self.states.transfers.synchronize()
        tensors, description = flatten_optimizer_state(self.optimizer)
        return tensors, {
            "optimizer": description,
            "skipped": float(self.skipped),
            "skipped_tensors": float(self.skipped_tensors),
            "norm": float(self._norm),
        }

    def restore(self, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, or a `GuardedOptimizer`'s.

        Raises:
            UserError: the state belongs to another optimizer or other parameters.
        """
        if self.states is not None:
            self.states.restore(tensors, state["optimizer"])
        else:
            restore_optimizer_state(self.optimizer, tensors, state["optimizer"])
            for p in self.parameters:
                if not self.optimizer.state[p]:  # without fusing, it had no gradient yet
                    self.optimizer.state[p].update(self.optimizer.initial_state(p))
        self.skipped.fill_(state["skipped"])
        self.skipped_tensors.fill_(state.get("skipped_tensors", 0.0))
        self._norm.fill_(state.get("norm", 0.0))
        self._start()

    def _completed(self, parameter: Tensor) -> None:
        """Take a parameter whose gradient is complete."""
        unit = self._unit.get(parameter)
        # Of the unit before, a parameter has no gradient.
        next_unit = unit is not None and self._open is not None and unit is not self._open
        if next_unit or self._pending_bytes + self._bytes[parameter] > self.group_bytes:
            gradient, parameter.grad = parameter.grad, None  # optimizers update all that have one
            self._apply()
            parameter.grad = gradient
        if next_unit:
            self._close_unit()
        if unit is not None:
            self._open = unit
            self._missing[id(unit)] -= 1
        self._pending.append(parameter)
        self._pending_bytes += self._bytes[parameter]
        if unit is not None and self._missing[id(unit)] == 0:
            self._apply()
            self._close_unit()
        elif self._pending_bytes >= self.group_bytes:
            self._apply()

    def _close_unit(self) -> None:
        if self._open is not None and self.weights is not None:
            self.weights.updated(self._open)
        self._open = None

    @torch.no_grad()
    def _apply(self) -> None:
        """Update the parameters whose gradients are complete, and free those."""
        group, self._pending, self._pending_bytes = self._pending, [], 0
        if not group:
            return
        gradients = [p.grad for p in group if p.grad is not None]
        each = norms(gradients)
        bad = ~torch.isfinite(each)
        self._squares += each.double().square().sum()
        self._bad_tensors += bad.sum()
        skip = (bad | self._bad_loss).float()
        with self.states.visiting(group) if self.states is not None else nullcontext():
            self.optimizer.update_group(group, skip, self._scale)
        for p in group:
            p.grad = None
