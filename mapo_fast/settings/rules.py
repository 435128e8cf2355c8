"""Which settings work together, and what the open ones of the memory plan are.

The settings of a memory plan (`OPEN`) need not be stated: the planner chooses them, and where nothing is
planned (`train.vram`), they take their defaults. A rule is therefore broken only if no choice of the open
ones keeps all rules; what is stated then contradicts itself. Where a default does not work with what is
stated, the nearest values that do take its place (`completed`):

    stated                                              completed by
    train.gradient_checkpointing = false                train.layout = "joint"
    offload.optimizer = "cpu"                           train.fused_step = true
    offload.weights = "cpu", adapter.kind = "full"      train.fused_step = true, offload.optimizer = "cpu"

Nearest means: the fewest open settings that differ from their defaults, and the values that `OPEN` names
first.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

OPEN: dict[str, tuple[Any, ...]] = {
    "train.layout": ("split", "joint", "sequential"),
    "train.gradient_checkpointing": (True, False),
    "train.fused_step": (False, True),
    "offload.optimizer": ("gpu", "cpu"),
    "offload.weights": ("gpu", "cpu"),
    "offload.activations": ("gpu", "cpu"),
}
"""Settings of a memory plan and their values, the default first. Gradients are the same under all of them.
Checkpointing may also be of some blocks by name: it then counts as true."""

_OTHERS: dict[str, tuple[Any, ...]] = {
    "train.accumulation": (1,),
    "train.precision": ("bf16",),
    "train.shard": (False,),
    "optim.name": ("adamw8bit", "adamw"),
    "optim.max_update_rms": (None,),
    "adapter.kind": ("lora", "full"),
    "adapter.base": ("dense",),
    "train.attention": ("sdpa",),
    "speed.channels_last": (False,),
    "speed.compile": (False,),
    "speed.cuda_graph": (False,),
    "speed.fp8": (False,),
}
"""The other settings that rules speak of, with the values that a message may propose."""


class _Rule(NamedTuple):
    """Settings that do not work together."""

    names: tuple[str, ...]
    broken: Callable[..., Any]
    """Called with their values."""
    why: str


_RULES = (
    _Rule(
        ("train.layout", "train.gradient_checkpointing"),
        lambda layout, blocks: layout == "split" and not blocks,
        "'split' works inside checkpointed blocks",
    ),
    _Rule(
        ("train.fused_step", "train.accumulation"),
        lambda fused, micro_batches: fused and micro_batches > 1,
        "a fused step updates weights during the backward pass of its only micro-batch",
    ),
    _Rule(
        ("train.fused_step", "train.layout"),
        lambda fused, layout: fused and layout == "sequential",
        "a fused step needs its gradients in one backward pass, 'sequential' has two",
    ),
    _Rule(
        ("train.fused_step", "train.precision"),
        lambda fused, precision: fused and precision == "fp16",
        "a fused step cannot unscale the gradients of fp16",
    ),
    _Rule(
        ("train.fused_step", "optim.name"),
        lambda fused, optimizer: fused and optimizer == "paged_adamw8bit",
        "bitsandbytes' paged optimizer updates all weights at once, a fused step does not",
    ),
    _Rule(
        ("optim.max_update_rms", "optim.name"),
        lambda limit, optimizer: limit is not None and optimizer != "adamw8bit",
        "only 'adamw8bit' limits updates",
    ),
    _Rule(
        ("adapter.base", "adapter.kind"),
        lambda base, kind: base != "dense" and kind == "full",
        "a quantised UNet is frozen, 'full' trains it",
    ),
    _Rule(
        ("train.precision", "adapter.kind"),
        lambda precision, kind: precision == "fp16" and kind == "full",
        "fp16 weights of a full fine-tune under- and overflow",
    ),
    _Rule(
        ("train.shard", "adapter.kind"),
        lambda shard, kind: shard and kind == "lora",
        "the weights of a full fine-tune are split, a LoRA's base is whole on each GPU",
    ),
    _Rule(
        ("train.shard", "optim.name"),
        lambda shard, optimizer: shard and optimizer != "adamw",
        "only 'adamw' updates a part of a tensor as it would the whole",
    ),
    _Rule(
        ("train.shard", "train.fused_step"),
        lambda shard, fused: shard and fused,
        "split gradients are summed behind a block's backward, a fused step has used them by then",
    ),
    _Rule(
        ("train.shard", "speed.channels_last"),
        lambda shard, channels_last: shard and channels_last,
        "FSDP2 splits contiguous weights only",
    ),
    _Rule(
        ("train.shard", "speed.compile"),
        lambda shard, compiled: shard and compiled,
        "compiled blocks do not know that their weights come and go",
    ),
    _Rule(
        ("offload.activations", "train.gradient_checkpointing"),
        lambda activations, blocks: activations == "cpu" and not blocks,
        "what is offloaded are the inputs of checkpointed blocks",
    ),
    _Rule(
        ("offload.optimizer", "train.fused_step"),
        lambda states, fused: states == "cpu" and not fused,
        "offloaded states visit the GPU around their update in a fused step",
    ),
    _Rule(
        ("offload.weights", "adapter.kind", "train.fused_step"),
        lambda weights, kind, fused: weights == "cpu" and kind == "full" and not fused,
        "streamed weights are updated while they visit the GPU, in a fused step",
    ),
    _Rule(
        ("offload.weights", "adapter.kind", "offload.optimizer"),
        lambda weights, kind, states: weights == "cpu" and kind == "full" and states == "gpu",
        "streamed weights that are trained go with offloaded states",
    ),
    _Rule(
        ("offload.weights", "adapter.base"),
        lambda weights, base: weights == "cpu" and base != "dense",
        "dense weights can be streamed, quantised ones cannot",
    ),
    *(
        _Rule(
            (f"offload.{part}", "speed.cuda_graph"),
            lambda place, captured: place == "cpu" and captured,
            "a CUDA graph holds no copies from system RAM",
        )
        for part in ("optimizer", "weights", "activations")
    ),
    _Rule(
        ("speed.fp8", "adapter.kind"),
        lambda fp8, kind: fp8 and kind == "lora",
        "what a LoRA leaves frozen is multiplied in fp8 with adapter.base = 'fp8'",
    ),
    _Rule(
        ("speed.compile", "train.attention"),
        lambda compile, attention: compile and attention != "sdpa",
        "compiled blocks have torch's own attention",
    ),
)

NAMES = (*OPEN, *_OTHERS)


def work(values: Mapping[str, Any]) -> bool:
    """Whether a value for each of `NAMES` makes a combination that works."""
    return _kept(_RULES, values)


def completed(values: Mapping[str, Any], stated: Collection[str]) -> dict[str, Any]:
    """Values for the open settings that work with what is stated, the nearest to their defaults.

    Args:
        values: of all `NAMES`, stated or default.
        stated: names of those that the config states.

    Raises:
        ValueError: there are none; the message names the settings that exclude each other, and what would do.
    """
    found = _nearest(_RULES, values, stated)
    if found is None:
        raise ValueError(_contradiction(values, stated))
    return found


def _kept(rules: Sequence[_Rule], values: Mapping[str, Any]) -> bool:
    return not any(rule.broken(*(values[name] for name in rule.names)) for rule in rules)


def _nearest(
    rules: Sequence[_Rule], values: Mapping[str, Any], stated: Collection[str]
) -> dict[str, Any] | None:
    for choice in _choices(tuple(name for name in OPEN if name not in stated)):
        if _kept(rules, {**values, **choice}):
            return choice
    return None


@functools.cache
def _choices(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """All values of some open settings, the nearest to the defaults first."""
    found = [
        dict(zip(names, picks, strict=True)) for picks in itertools.product(*(OPEN[name] for name in names))
    ]
    return sorted(found, key=lambda choice: sum(value != OPEN[name][0] for name, value in choice.items()))


def _contradiction(values: Mapping[str, Any], stated: Collection[str]) -> str:
    """Name the fewest rules that cannot be kept together, by the settings that are given."""
    rules = list(_RULES)
    for rule in _RULES:
        fewer = [other for other in rules if other is not rule]
        if _nearest(fewer, values, stated) is None:
            rules = fewer
    named = {name: None for rule in rules for name in rule.names if name in stated or name not in OPEN}
    # Where there is a second contradiction, no single change mends all: then one that mends this one.
    for kept in (_RULES, rules):
        ways = [way for name in named if (way := _way_out(name, kept, values, stated))]
        if ways:
            break
    given = " and ".join(f"{name} = {json.dumps(values[name])}" for name in named)
    why = "; ".join(rule.why for rule in rules)
    return f"{given} cannot be combined ({why}): {', or '.join(ways)}"


def _way_out(name: str, rules: Sequence[_Rule], values: Mapping[str, Any], stated: Collection[str]) -> str:
    """The first other value of a setting with which the rest works, or an empty text."""
    for value in OPEN.get(name) or _OTHERS[name]:
        if value != values[name] and _nearest(rules, {**values, name: value}, {*stated, name}) is not None:
            return f"leave out {name}" if value is None else f"use {name} = {json.dumps(value)}"
    return ""
