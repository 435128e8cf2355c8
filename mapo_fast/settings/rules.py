"""Which settings work together, and which values the unset ones of the memory plan take.

The settings of a memory plan (declared `planned="exact"`) may be unset: the planner chooses them, and where
nothing is planned (`train.vram`), they take their defaults. A config is rejected only if no values of the
unset settings satisfy every rule. Where a default does not work with the set values, the nearest values that
do take its place (`completed`):

    set                                                 completed by
    train.gradient_checkpointing = false                train.layout = "joint"
    offload.optimizer = "cpu"                           train.fused_step = true
    offload.weights = "cpu", adapter.kind = "full"      train.fused_step = true, offload.optimizer = "cpu"

Nearest means: the fewest unset settings that differ from their defaults, and the values that are declared
first.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mapo_fast.settings.declare import Setting
from mapo_fast.settings.optimizers import OPTIMIZERS


class _Rule(NamedTuple):
    """Settings that do not work together."""

    names: tuple[str, ...]
    broken: Callable[..., Any]
    """Called with the values of the settings; true where they do not work together."""
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
        lambda fused, optimizer: fused and not OPTIMIZERS[optimizer].fused_step,
        "this optimizer updates all tensors at once, a fused step updates a few at a time",
    ),
    _Rule(
        ("optim.max_update_rms", "optim.name"),
        lambda limit, optimizer: limit is not None and not OPTIMIZERS[optimizer].limits_updates,
        "this optimizer does not limit its updates",
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
        lambda shard, optimizer: shard and not OPTIMIZERS[optimizer].shard,
        "this optimizer does not update a part of a tensor as it would the whole",
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
        ("train.shard", "ema.half_life"),
        lambda shard, half_life: shard and half_life is not None,
        "the average is of whole tensors, split ones are in parts on several GPUs",
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
        ("speed.cuda_graph", "train.accumulation"),
        lambda captured, micro_batches: captured and micro_batches > 1,
        "a CUDA graph holds a step of one micro-batch",
    ),
    _Rule(
        ("speed.cuda_graph", "optim.name"),
        lambda captured, optimizer: captured and not OPTIMIZERS[optimizer].cuda_graph,
        "a CUDA graph cannot hold an optimizer that reads numbers on the host",
    ),
    _Rule(
        ("speed.cuda_graph", "train.precision"),
        lambda captured, precision: captured and precision == "fp16",
        "a CUDA graph cannot hold the gradient scaler of fp16",
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
    _Rule(
        ("train.attention", "train.precision"),
        lambda attention, precision: attention == "flash" and precision == "fp32",
        "flash-attn computes in fp16 or bf16",
    ),
)

NAMES = tuple(dict.fromkeys(name for rule in _RULES for name in rule.names))
"""The settings that rules are about. A list of blocks for checkpointing counts as true."""


def work(values: Mapping[str, Any]) -> bool:
    """Whether a value for each of `NAMES` makes a combination that works."""
    return _kept(_RULES, values)


def completed(values: Mapping[str, Any], stated: Collection[str], table: Sequence[Setting]) -> dict[str, Any]:
    """Values for the unset settings that work with the set ones, nearest to their defaults.

    Args:
        values: values of all `NAMES`, set or default.
        stated: names of the settings that the config sets.
        table: all settings.

    Raises:
        ValueError: there are no such values; the message names the settings that exclude each other, and a
            fix.
    """
    case = _Case(values, stated, {row.name: row for row in table})
    found = case.nearest(_RULES)
    if found is None:
        raise ValueError(case.contradiction())
    return found


def _kept(rules: Sequence[_Rule], values: Mapping[str, Any]) -> bool:
    return not any(rule.broken(*(values[name] for name in rule.names)) for rule in rules)


class _Case(NamedTuple):
    """Settings to check against the rules."""

    values: Mapping[str, Any]
    stated: Collection[str]
    table: Mapping[str, Setting]

    def is_open(self, name: str) -> bool:
        """Whether a setting may take another value."""
        return self.table[name].planned == "exact" and name not in self.stated

    def nearest(self, rules: Sequence[_Rule]) -> dict[str, Any] | None:
        """Values of the unset settings that satisfy the rules, if there are any."""
        for choice in _choices(
            tuple((row.name, row.choices) for row in self.table.values() if self.is_open(row.name))
        ):
            if _kept(rules, {**self.values, **choice}):
                return choice
        return None

    def contradiction(self) -> str:
        """Describe the smallest set of rules that cannot be satisfied together, by the given settings."""
        rules = list(_RULES)
        for rule in _RULES:
            fewer = [other for other in rules if other is not rule]
            if self.nearest(fewer) is None:
                rules = fewer
        named = {name: None for rule in rules for name in rule.names if not self.is_open(name)}
        # Two independent conflicts: suggest a fix for this one only.
        for kept in (_RULES, rules):
            ways = [way for name in named if (way := self.way_out(name, kept))]
            if ways:
                break
        given = " and ".join(f"{name} = {json.dumps(self.values[name])}" for name in named)
        why = "; ".join(rule.why for rule in rules)
        return f"{given} cannot be combined ({why}): {', or '.join(ways)}"

    def way_out(self, name: str, rules: Sequence[_Rule]) -> str:
        """The first other value of a setting with which the rest works, or an empty text."""
        for value in self.table[name].choices:
            other = self._replace(values={**self.values, name: value}, stated={*self.stated, name})
            if value != self.values[name] and other.nearest(rules) is not None:
                return f"leave out {name}" if value is None else f"use {name} = {json.dumps(value)}"
        return ""


@functools.cache
def _choices(open_: tuple[tuple[str, tuple[Any, ...]], ...]) -> list[dict[str, Any]]:
    """All values of some unset settings, nearest to the defaults first."""
    found = [
        dict(zip((name for name, _ in open_), picks, strict=True))
        for picks in itertools.product(*(values for _, values in open_))
    ]
    defaults = {name: values[0] for name, values in open_}
    return sorted(found, key=lambda choice: sum(choice[name] != defaults[name] for name in choice))
