"""Mistakes in a config, in one line: the names of keys, their values, and what is valid."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from mapo_fast.settings.foreign import foreign
from mapo_fast.util.errors import shown


def mistakes(error: ValidationError, model: type[BaseModel]) -> str:
    """The first few mistakes that pydantic found in a `model` with sections, as text.

    Unknown keys come first: where a whole section is missing, they say why.
    """
    found = sorted(error.errors(), key=lambda one: one["type"] not in _UNKNOWN)
    return "; ".join(dict.fromkeys(_explain(one, model) for one in found[:3]))


def meant(key: str, model: type[BaseModel]) -> str | None:
    """A hint on an unknown key: it is another trainer's, or belongs to another section; else None."""
    if known := foreign(key):
        return known.hint
    key = key.lstrip("-").replace("-", "_").rpartition(".")[2]
    homes = [f"{section}.{key}" for section in model.model_fields if key in _fields(model, [section])]
    return f"did you mean {' or '.join(homes)}?" if homes else None


_UNKNOWN = ("extra_forbidden", "unknown_setting")


_SHAPES = {
    "train.vram": 'write a size with its unit, such as "24GiB"',
    "train.gradient_checkpointing": 'write true, false or a list of block names such as ["down_blocks.2"]; '
    "recomputation is always non-reentrant, which 'split' and the fused step need",
}
"""Hints for values of the wrong type, by setting."""


def _explain(error: Any, model: type[BaseModel]) -> str:
    loc = [str(part) for part in error["loc"]][:2]  # what follows names a member of a union
    loc += [error["ctx"]["key"]] if error["type"] == "unknown_setting" else []
    name = ".".join(loc)
    if error["type"] in _UNKNOWN:
        if len(loc) == 1 and isinstance(error["input"], dict):  # a section, with keys of its own
            hints = {f"{name}.{key}": foreign(key) for key in error["input"]}
            if said := [f"unknown key {key} ({one.hint})" for key, one in hints.items() if one][:3]:
                return "; ".join(said)
        elif hint := meant(loc[-1], model):
            return f"unknown key {name} ({hint})"
        known = list(_fields(model, loc[:-1]))
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        if near:
            return f"unknown key {name} (did you mean {'.'.join([*loc[:-1], near[0]])}?)"
        return f"unknown key {name} (valid: {', '.join(known)})"
    if error["type"] == "missing":
        few = f"{name} = {shown(error['input'])} has too few values"
        return few if len(error["loc"]) > 2 else f"{name} is missing"
    if error["type"] == "whole_message":
        return str(error["msg"])
    message = _SHAPES.get(name) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "multiple_of":
        step = error["ctx"]["multiple_of"]
        message += f", such as {max(1, error['input'] // step) * step}"
    if not name:
        return str(message)
    return f"{name} = {shown(error['input'])}: {message}"


def _fields(model: Any, loc: list[str]) -> dict[str, Any]:
    for part in loc:
        model = model.model_fields[part].annotation
    return dict(model.model_fields)
