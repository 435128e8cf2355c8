"""AdamW with 8-bit moments and stochastic rounding, for all tensors of a model in a handful of launches.

    m ← β₁ m + (1 − β₁) g           v ← β₂ v + (1 − β₂) g²           g = gradient / grad_scale
    u = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)                     u ← u · min(1, max_update_rms / RMS(u))
    p ← round(p · (1 − lr · weight_decay) − lr · u)

RMS(u) is over one tensor's elements. m and v lie in memory as bitsandbytes' AdamW8bit keeps them: one byte
an element, a code of its dynamic book (`_dynamic_code.py`), times the largest magnitude of each 256
elements in memory order; fp32 in tensors below 4,096 elements.

Stochastic rounding. To bf16 and fp16, `round` picks one of the two neighbours with probabilities that make
the result right in expectation: at lr 1e-6 an update is far below half the distance of two bf16 numbers,
and rounding to nearest would drop it every time. Numbers that the type holds stay as they are, finite ones
stay finite. The 16 random bits are a function of (seed, tensor id, step, element): Philox with the seed as
key and (element // 8, id, step) as counter, word (element % 8) // 2, low half first. So they do not depend
on launches, blocks or the other tensors.

Nothing is read by the host: lr, seed, steps, grad_scale and found_inf are tensors on the device. Where
found_inf, one value or one for each tensor, is not 0, nothing is written and no step is counted.

One launch counts steps, and one updates all tensors of a combination of dtypes: 3 for an SDXL UNet; clipping
adds two passes. See `_adamw8bit_kernels.py`.

Dtypes. Parameters and gradients bf16, fp16, fp32, fp64, in any combination; moments fp32 or 8-bit.
Arithmetic is fp32. fp64 parameters, and everything without Triton, take the same steps in plain torch, in
bitsandbytes' order of operations: on the CPU, without stochastic rounding, equal to bitsandbytes 0.50 bit
for bit, which includes its CPU library's coarser choice of codes (`cpu_code`); kernels choose the nearest,
as bitsandbytes' do.

Least traffic per element: parameter read and written, gradient read, two codes read and written, and 16
bytes per 256 elements for the block maxima: 10.06 bytes with bf16. The kernel moves that plus 2.2 kB per
16,384 elements, 1.3 % (the code books, a row of each table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count, groupby
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mapo_kernels.hardware import backend
from mapo_kernels.ops._adamw8bit_eager import eager_step
from mapo_kernels.ops._adamw8bit_kernels import Plan, capturing, launch, make_plan
from mapo_kernels.ops._adamw8bit_tensors import (
    QUANTISED_BLOCK,
    Settings,
    Tensors,
    check,
    check_flags,
    in_order,
    same_order,
)
from mapo_kernels.ops._dynamic_code import code_book

__all__ = ["AdamW8bit", "Tensors", "adamw8bit_", "new_state"]

SMALLEST_QUANTISED = 4096
"""Tensors with fewer elements keep fp32 moments, as in bitsandbytes."""

MOST_PLANS = 1024
"""Sets of parameters whose tables are kept: a step that is taken in parts finds each part's again."""


# --- Operator ---


@torch.library.custom_op(
    "mapo::adamw8bit_",
    mutates_args=("params", "state1", "state2", "absmax1", "absmax2", "steps"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor(f!)[] steps, int[] ids, Tensor lr, Tensor? seed, "
    "Tensor? found_inf, Tensor? grad_scale, float beta1, float beta2, float eps, float weight_decay, "
    "float? max_update_rms) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # uploads a table when gradients have moved
)
def _adamw8bit_op(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    steps: list[Tensor],
    ids: list[int],
    lr: Tensor,
    seed: Tensor | None,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_update_rms: float | None,
) -> None:
    take_step(
        Tensors(params, grads, state1, state2, absmax1, absmax2, steps, ids),
        Settings(lr, seed, found_inf, grad_scale, beta1, beta2, eps, weight_decay, max_update_rms),
        make_plan,
    )


@_adamw8bit_op.register_fake
def _(*_: Any) -> None:
    return None


def take_step(tensors: Tensors, settings: Settings, plan: Callable[[Tensors], Plan]) -> None:
    """One step: fp64 parameters and everything without Triton in plain torch, the rest by kernels.

    Fake tensors are left as they are: they have no addresses, and tables and partial sums are small.
    """
    if isinstance(tensors.params[0], FakeTensor):
        return
    eager = [backend(p.device).name == "eager" or p.dtype == torch.float64 for p in tensors.params]
    for rest in (False, True):
        chosen = [i for i, plain in enumerate(eager) if plain == rest]
        if not chosen:
            continue
        part, flags = tensors, settings.found_inf
        if len(chosen) < len(eager):
            part = Tensors._make([values[i] for i in chosen] for values in tensors)
            if flags is not None and flags.numel() > 1:
                flags = torch.stack([flags[i] for i in chosen])
        if rest:
            eager_step(part, settings._replace(found_inf=flags))
        else:
            launch(plan(part), settings._replace(found_inf=flags))


# --- Public ---


def adamw8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    seed: Tensor | None = None,
    ids: Sequence[int] | None = None,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    max_update_rms: float | None = None,
) -> None:
    """One AdamW step in place, of all tensors at once. `AdamW8bit` makes the states and calls it.

    Args:
        params: bf16, fp16, fp32 or fp64, dense in memory in any order, on one device.
        grads: of the parameters' shapes and memory order; bf16, fp16, fp32 or fp64 (kernels: not fp64).
        state1, state2: first and second moments in the parameters' memory order: uint8 codes, or fp32.
        absmax1, absmax2: fp32 (ceil(numel / 256),) for uint8 moments, empty tensors for fp32 ones.
        steps: int64 tensors of one element: the steps taken so far; counted here.
        lr: a tensor of one element on the device, like `seed`, `found_inf` and `grad_scale`.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: int64; rounds bf16 and fp16 parameters stochastically. None rounds to nearest.
        ids: each tensor's number for its random bits; its place in the list if not given.
        found_inf: where it is not 0, nothing is changed; or one value for each tensor, contiguous.
        grad_scale: what the gradients are divided by.
        max_update_rms: largest root mean square of a tensor's update, see the top of this file.

    Raises:
        ValueError, TypeError: a tensor does not fit; the message names it.
    """
    tensors = Tensors(params, grads, state1, state2, absmax1, absmax2, steps, ids or range(len(params)))
    if not params:
        return
    check(tensors)
    check_flags(found_inf, len(params))
    _adamw8bit_op(
        *(list(values) for values in tensors),
        lr,
        seed,
        found_inf,
        grad_scale,
        *map(float, betas),
        float(eps),
        float(weight_decay),
        max_update_rms,
    )


def new_state(p: Tensor) -> dict[str, Any]:
    """What `AdamW8bit` keeps for a parameter, as it is before its first step."""
    quantised = p.numel() >= SMALLEST_QUANTISED
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
    for key, signed in (("1", True), ("2", False)):
        state[f"state{key}"] = torch.zeros_like(
            p, dtype=torch.uint8 if quantised else torch.float32, requires_grad=False
        )
        if quantised:
            state[f"qmap{key}"] = code_book(signed, p.device)
            state[f"absmax{key}"] = torch.zeros(-(-p.numel() // QUANTISED_BLOCK), device=p.device)
    return state


_WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' `state_dict` keeps the tensors that FSDP must not see."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments: bitsandbytes' AdamW8bit with stochastic rounding and without host waits.

    States have bitsandbytes' names and layout: `step` (here a tensor), `state1`, `state2`, `qmap1`, `qmap2`,
    `absmax1`, `absmax2`; the last four only in tensors of at least 4,096 elements. `load_state_dict` takes
    bitsandbytes' and its own. They belong to a parameter's elements by their order in memory: a parameter
    whose memory order changed after the first step is laid out again as it was.

    `found_inf` and `grad_scale`, if set as attributes before `step()`, are tensors on the device as for
    torch's fused AdamW, so `torch.amp.GradScaler` skips bad steps without a host wait. `found_inf` may also
    have a value for each parameter with a gradient, in order: those where it is not 0 are skipped.

    CUDA graphs: capture `step()` after one step outside; pass `lr` as a tensor and change it in place. A
    graph needs its step's tables: they live as long as the optimizer, or as what `take_captured` returns.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        stochastic_rounding: of bf16 and fp16 parameters; others are rounded to nearest anyway.
        seed: of the random bits, which also depend on the step, the parameter's place and the element.
        max_update_rms: largest root mean square of a tensor's update before lr, as in Adafactor; None: any.
    """

    _step_supports_amp_scaling = True
    """What `torch.amp.GradScaler` asks for before it sets the next two."""
    found_inf: Tensor
    grad_scale: Tensor

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
        max_update_rms: float | None = None,
    ) -> None:
        for name, value, good in (
            ("lr", lr, isinstance(lr, Tensor) or lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("max_update_rms", max_update_rms, max_update_rms is None or max_update_rms > 0),
            ("seed", seed, -(2**63) <= seed < 2**63),
        ):
            if not good:
                raise ValueError(f"{name}: {value} is out of range")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "max_update_rms": max_update_rms,
        }
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Start without tables: they hold addresses."""
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._captured: list[Plan] = []
        self._scalars: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer: parameters, settings and states, but no tables."""
        super().__setstate__(state)
        self._forget()

    def take_captured(self) -> list[Plan]:
        """The tables of the steps captured since the last call, to be kept as long as their graph."""
        taken, self._captured = self._captured, []
        return taken

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient keep their value and their step count."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_part([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss

    @torch.no_grad()
    def step_part(self, params: Sequence[Tensor]) -> None:
        """Take one step with some parameters that have a gradient, without a look at the others.

        Those of one parameter group come together. `found_inf` may have a value for each, in their order.
        """
        if len(self._places) != sum(len(group["params"]) for group in self.param_groups):
            numbers = count()
            self._places = {
                p: (index, next(numbers))
                for index, group in enumerate(self.param_groups)
                for p in group["params"]
            }
        flags = getattr(self, "found_inf", None)
        check_flags(flags, len(params))
        done = 0
        for index, part in groupby(params, key=lambda p: self._places[p][0]):
            members = [(self._places[p][1], p) for p in part]
            own = flags
            if flags is not None and flags.numel() > 1:
                own = flags[done : done + len(members)]
            self._step_group(index, self.param_groups[index], members, own)
            done += len(members)

    def _step_group(
        self, index: int, group: dict[str, Any], members: list[tuple[int, Tensor]], found_inf: Tensor | None
    ) -> None:
        states = [self._state(p, i) for i, p in members]
        params = [p for _, p in members]
        device = params[0].device
        nothing = torch.empty(0, device=device)
        tensors = Tensors(
            params=params,
            grads=[in_order(p.grad, p) for p in params if p.grad is not None],
            state1=[state["state1"] for state in states],
            state2=[state["state2"] for state in states],
            absmax1=[state.get("absmax1", nothing) for state in states],
            absmax2=[state.get("absmax2", nothing) for state in states],
            steps=[state["step"] for state in states],
            ids=[i for i, _ in members],
        )
        settings = Settings(
            self._scalar(index, group, "lr", torch.float64, device),
            self._scalar(index, group, "seed", torch.int64, device) if group["stochastic_rounding"] else None,
            found_inf,
            getattr(self, "grad_scale", None),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            max_update_rms=group["max_update_rms"],
        )

        def plan(part: Tensors) -> Plan:
            """The last one of these parameters, unless a tensor lies elsewhere or is another."""
            key = (index, *part.ids)
            last = self._plans.pop(key, None)
            where = [t.data_ptr() for values in part[:3] for t in values]
            if (
                last is None
                or last.where[: len(where)] != where
                or any(a is not b for a, b in zip(last.steps, part.steps, strict=True))
            ):
                check(part)
                last = make_plan(part, last)
            self._plans[key] = last
            if len(self._plans) > MOST_PLANS:
                del self._plans[next(iter(self._plans))]  # the one not used for longest
            if capturing(device):
                self._captured.append(last)  # a graph needs its tables as long as it lives
            return last

        take_step(tensors, settings, plan)

    def _scalar(
        self, index: int, group: dict[str, Any], key: str, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A group's setting on the device; written again, without a host wait, when it changed."""
        value = group[key]
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        known = self._scalars.get((index, key))
        if known is None or known[0] != value or known[1].device != device:
            tensor = known[1] if known is not None and known[1].device == device else None
            tensor = torch.empty((), dtype=dtype, device=device) if tensor is None else tensor
            known = self._scalars[index, key] = value, tensor.fill_(value)
        return known[1]

    def _state(self, p: Tensor, tensor_id: int) -> dict[str, Any]:
        """A parameter's state: made, or brought into shape where it was loaded."""
        state: dict[str, Any] = self.state[p]
        name = f"parameter {tensor_id} of shape {tuple(p.shape)}"
        if not state:
            state.update(new_state(p))
        elif not isinstance(state["step"], Tensor):
            for key, signed in (("1", True), ("2", False)):
                book = state.get(f"qmap{key}")
                if book is not None and not torch.equal(book.to(p.device), code_book(signed, p.device)):
                    raise ValueError(f"{name}: qmap{key} is not the dynamic 8-bit map; make a new optimizer")
                moment = state[f"state{key}"]
                if not moment.is_contiguous():
                    raise ValueError(
                        f"{name}: bitsandbytes' state{key} has strides {moment.stride()}, which do not say "
                        "the order of its blocks; make a new optimizer"
                    )
            state["step"] = torch.tensor(state["step"], dtype=torch.int64, device=p.device)
        if state["state1"].shape != p.shape:
            raise ValueError(f"{name}: its state has shape {tuple(state['state1'].shape)}, it is another's")
        if not same_order(p, state["state1"]):
            if not same_order(p, torch.empty_like(p, device="meta")):
                raise ValueError(f"{name}: strides {p.stride()} leave gaps in memory; make it contiguous")
            p.data = in_order(p, state["state1"])
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict` of this class or of `bitsandbytes.optim.AdamW8bit`; nothing is cast.

        Raises:
            ValueError: the parameter groups do not match.
        """
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("state_dict: its parameter groups are not of this optimizer's sizes")
        keys = chain.from_iterable(g["params"] for g in saved_groups)
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        self.state.clear()
        for key, p in zip(keys, params, strict=True):
            saved = dict(state_dict["state"].get(key, {}))
            saved.update(saved.pop(_WRAPPED, {}))
            if saved:
                self.state[p] = {
                    name: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in saved.items()
                }
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
