"""Optimizer states as named tensors plus JSON, and back, without pickle and bit for bit.

Works for any `torch.optim.Optimizer`; in our AdamW8bit a state of bitsandbytes' goes on. Tensors are named
`<parameter index>.<state name>`, the index counting through all parameter groups in order; a tensor that
several parameters share (the code books) is stored once. `load_state_dict` is not used: torch's casts states
to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mapo_fast.settings.optimizers import REMOVED
from mapo_fast.util.errors import UserError

_IMPLEMENTATION_KEYS = ("params", "fused", "foreach", "capturable", "differentiable", "maximize")
"""Group entries that say how a step is computed: the new optimizer's values are kept."""


def flatten_optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors (not copied) and JSON.

    Returns:
        Tensors by name, and a dict for JSON: class name, shapes, scalars, aliases, strides, group settings.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    strides: dict[str, list[int]] = {}
    names: dict[int, str] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{index}.{key}"
            if not isinstance(value, Tensor):
                scalars[name] = value
            elif id(value) in names:
                aliases[name] = names[id(value)]
            else:
                names[id(value)] = name
                tensors[name] = value
                if _by_memory_order(optimizer) and not value.is_contiguous():
                    strides[name] = list(value.stride())
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in _IMPLEMENTATION_KEYS}
        for group in optimizer.param_groups
    ]
    description = {
        "class": type(optimizer).__name__,
        "shapes": [list(parameter.shape) for parameter in _parameters(optimizer)],
        "scalars": scalars,
        "aliases": aliases,
        "strides": strides,
        "groups": groups,
    }
    return tensors, description


def restore_optimizer_state(
    optimizer: Optimizer,
    tensors: Iterable[tuple[str, Tensor]],
    description: Mapping[str, Any],
    *,
    place: Callable[[Tensor, str], Tensor | None] = lambda parameter, key: None,
) -> None:
    """Give a freshly built optimizer the state that `flatten_optimizer_state` took.

    Every tensor is copied into a fresh allocation on its parameter's device; a `step` tensor goes where
    torch's implementation expects it.

    Args:
        optimizer: just built, over the same parameters in the same groups.
        tensors: (name, tensor) pairs, used one by one: `checkpoint.views("optimizer")`.
        description: the dict that went with them.
        place: existing memory for a parameter's state of this name; used if shape and dtype fit.

    Raises:
        UserError: the state was made by another or a removed optimizer class, or for other shapes.
    """
    parameters = _parameters(optimizer)
    if description["class"] == "PagedAdamW8bit":
        raise UserError(f"the checkpoint was made with 'paged_adamw8bit', and {REMOVED['paged_adamw8bit']}")
    if description["class"] != type(optimizer).__name__:
        raise UserError(
            f"the checkpoint was made with {description['class']}, optim.name gives "
            f"{type(optimizer).__name__}: resume with the optimizer of the run"
        )
    shapes = [list(parameter.shape) for parameter in parameters]
    if shapes != description["shapes"] or len(optimizer.param_groups) != len(description["groups"]):
        raise UserError(
            f"the checkpoint's optimizer state is for {len(description['shapes'])} tensors that are not the "
            f"{len(shapes)} trained here: resume with the model and adapter settings of the run"
        )
    for group, saved in zip(optimizer.param_groups, description["groups"], strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) else value

    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    placed: dict[str, Tensor] = {}
    for name, tensor in tensors:
        index, key = _split(name)
        strides = description["strides"].get(name)
        fresh = place(owners[index][0], key)
        if fresh is None or fresh.shape != tensor.shape or fresh.dtype != tensor.dtype:
            fresh = _allocate(optimizer, *owners[index], key, tensor, strides)
        elif _by_memory_order(optimizer):
            fresh = fresh.as_strided(
                tensor.shape, strides or torch.empty_like(tensor, device="meta").stride()
            )
        with torch.no_grad():
            placed[name] = fresh.copy_(tensor)
    entries: dict[str, Any] = {
        **placed,
        **description["scalars"],
        **{name: placed[source] for name, source in description["aliases"].items()},
    }
    for name, value in entries.items():
        index, key = _split(name)
        optimizer.state[parameters[index]][key] = value


def _plain(value: Any) -> Any:
    """A setting for JSON; the learning rate may be a tensor."""
    return value.item() if isinstance(value, Tensor) else value


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _split(name: str) -> tuple[int, str]:
    index, _, key = name.partition(".")
    return int(index), key


def _by_memory_order(optimizer: Optimizer) -> bool:
    """Whether states belong to the parameter's elements by their order in memory.

    AdamW8bit lays a parameter out like its state, so that these strides are part of the state. torch's states
    follow the parameter's own layout.
    """
    return bool(getattr(optimizer, "states_by_memory_order", False))


def _allocate(
    optimizer: Optimizer,
    parameter: Tensor,
    group: Mapping[str, Any],
    key: str,
    saved: Tensor,
    strides: list[int] | None,
) -> Tensor:
    """An uninitialised tensor for one state, where the optimizer would have made it."""
    device = parameter.device
    flagged = getattr(optimizer, "_step_supports_amp_scaling", False)  # it counts where it reads the flag
    if key == "step" and not (flagged or group.get("fused") or group.get("capturable")):
        device = torch.device("cpu")
    if strides is not None:
        return torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device=device)
    if saved.shape == parameter.shape and not _by_memory_order(optimizer):
        return torch.empty_like(parameter, dtype=saved.dtype, device=device, requires_grad=False)
    return torch.empty(saved.shape, dtype=saved.dtype, device=device)
