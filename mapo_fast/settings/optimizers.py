"""The optimizers as plain data: what they can do and who builds them. It imports the standard library only.

Rules, planner and engine ask an optimizer's entry, never its name. What computes is named here and imported
when it is first built; the built-in ones are in `mapo_fast/engine/optimizers.py`.

`register_optimizer` adds one from outside; `docs/extend/optimizer.md` says how.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer's entry for the settings, the planner and the engine.

    Where an ability is False, the settings that need it are rejected with this optimizer.
    """

    build: str
    """"module:NAME" of a function of (parameters, `OptimConfig`, seed) that returns a
    `torch.optim.Optimizer`. The seed is for random bits that it may draw."""
    fused_step: bool = False
    """Whether it updates some tensors while others have no gradients yet (`train.fused_step`, and the offload
    that needs it): `build` then returns a `mapo_fast.engine.optimizers.Fusable`."""
    cuda_graph: bool = False
    """Whether its step can be captured (`speed.cuda_graph`): it reads nothing on the host, counts its steps
    on the device and takes the learning rate as a 0-d tensor there."""
    shard: bool = False
    """Whether it updates a part of a tensor as it would the whole (`train.shard`): element by element, with
    states of the tensor's shape, or 0-d."""
    limits_updates: bool = False
    """Whether it supports `optim.max_update_rms`."""
    rounds_stochastically: bool = False
    """Whether bf16 weights keep, on average, updates that are smaller than their spacing (`train.precision =
    "pure_bf16"`)."""
    smaller: str | None = None
    """The optimizer that computes nearly the same with smaller states: the planner's choice where nothing
    else fits and the config leaves `optim.name` out."""


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        build="mapo_fast.engine.optimizers:adamw",
        fused_step=True,
        cuda_graph=True,
        shard=True,
        smaller="adamw8bit",
    ),
    "adamw8bit": Optimizer(
        build="mapo_fast.engine.optimizers:adamw8bit",
        fused_step=True,
        cuda_graph=True,
        limits_updates=True,
        rounds_stochastically=True,
    ),
    "adafactor": Optimizer(build="mapo_fast.engine.optimizers:adafactor", fused_step=True),
}

REMOVED = {
    "paged_adamw8bit": "it was removed. Use 'adamw8bit', with offload.optimizer = 'cpu' for states in system "
    "RAM, in a new run: begin it from the weights of the last checkpoint, whose README.txt says how to load "
    "them",
}
"""Optimizers of older versions, and what to use instead."""


def optimizer_names() -> tuple[str, ...]:
    """Every name that `optim.name` may have."""
    return tuple(OPTIMIZERS)


_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


def register_optimizer(name: str, optimizer: Optimizer) -> None:
    """Add an optimizer, so that `optim.name = "<name>"` trains with it.

    Args:
        name: lower-case letters, digits and underscores.
        optimizer: its entry.

    Raises:
        TypeError, ValueError: the name is taken, or the entry is not well-formed; nothing is registered.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer {name!r}: register an Optimizer, not {type(optimizer).__name__}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"optimizer {name!r}: a name is lower-case letters, digits and underscores")
    if name in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is registered already: choose another name")
    if name in REMOVED:
        raise ValueError(f"optimizer {name!r} is the name of one that was removed: choose another name")
    if not re.fullmatch(r"[\w.]+:\w+", optimizer.build):
        raise ValueError(f"optimizer {name!r}: build = {optimizer.build!r} is not written as 'module:NAME'")
    if optimizer.smaller is not None and optimizer.smaller not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: smaller = {optimizer.smaller!r} is no registered optimizer")
    OPTIMIZERS[name] = optimizer
