"""The fastest plan that fits.

Settings that the config states are kept; the planner chooses the others:

    train.layout, train.gradient_checkpointing (block by block), train.fused_step, offload.*

All of these give the same gradients. Only where none of them fits is something proposed that changes what is
computed: AdamW with 8-bit states, bf16 weights without fp32 masters, a quantised base under a LoRA.

`family.py` composes the plans; the fastest is then traced itself, and the next one if it does not keep what
was promised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from mapo_fast.hardware.allocator import EXPANDABLE, Rules
from mapo_fast.hardware.cards import Card, usable_bytes, vram_for
from mapo_fast.hardware.host import Host
from mapo_fast.planner.family import BLOCKS, Family, stated
from mapo_fast.planner.plan import Loser, Plan, PlanResult
from mapo_fast.planner.stages import SDXL_VAE, Vae, how_to_prepare, preparing, previewing
from mapo_fast.planner.store import Progress, Tracing, no_progress
from mapo_fast.planner.trace import Trace
from mapo_fast.settings.load import parse_config, with_settings
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import Config
from mapo_fast.util.sizes import GIB, size_text

BOTHER = 0.01
"""Slowdown charged per offloaded item or fused step when ranking plans."""


def search(
    config: Config,
    unet_config: dict[str, Any],
    card: Card,
    vram: int,
    host: Host,
    *,
    vae: Vae = SDXL_VAE,
    rules: Rules = EXPANDABLE,
    progress: Progress = no_progress,
    tracing: Tracing | None = None,
) -> PlanResult:
    """Choose a plan for training `config`'s UNet on a card with `vram` bytes of free memory.

    Args:
        vae: the VAE that decodes previews.
        rules: rules of torch's allocator on that machine.
        progress: called with the number of traces made, and of how many.
        tracing: makes the traces, if shared with other questions; it is not closed.
    """
    if config.speed.cuda_graph:
        card = card._replace(rates=card.rates._replace(host=0.0))  # a step is launched at once
    if tracing is not None:
        return _Search(config, unet_config, card, vram, host, vae, tracing, rules).outcome()
    with closing(Tracing(kernels=card.kernels, progress=progress)) as own:
        return _Search(config, unet_config, card, vram, host, vae, own, rules).outcome()


class _Search:
    """One question to the planner."""

    def __init__(
        self,
        config: Config,
        unet_config: dict[str, Any],
        card: Card,
        vram: int,
        host: Host,
        vae: Vae,
        tracing: Tracing,
        rules: Rules,
    ) -> None:
        self.rules = rules
        self.config, self.unet_config, self.card, self.vram = config, unet_config, card, vram
        self.host, self.vae, self.tracing = host, vae, tracing
        self.usable = usable_bytes(vram)
        self.others: list[Loser] = []

    def outcome(self) -> PlanResult:
        """The fastest plan of the first family that has one."""
        small: list[tuple[Plan, Family]] = []
        for changes in _variants(self.config):
            family = self._family(self.config, changes)
            frugal = family.frugal()
            if family.least() > self.usable:
                family.give_up()
                small.append((frugal, family))
                self.others.append(Loser(frugal, self._lacks(frugal)))
                continue
            plans = family.plans()
            found = self._fastest(family, plans)
            if found is not None:
                return self._chosen(*found)
            small += [(plan, family) for plan in [frugal, *plans]]
        # Composing errs by a few MiB: only a full trace says that the smallest plan does not fit.
        smallest, family = min(small, key=lambda one: (bool(_no_ram(one[0], self.host)), one[0].reserved))
        if not smallest.traced or not self._lacks(smallest):
            smallest, trace = family.traced(smallest)
            if not self._lacks(smallest):
                return self._chosen(smallest, trace)
        advice, enough = self._advice(smallest, [plan for plan, _ in small])
        given = self.card, self.vram, self.usable, self.host
        return PlanResult(*given, None, None, self.others, {}, "", advice, enough)

    def _family(self, config: Config, changes: dict[str, Any]) -> Family:
        given = config, changes, self.unet_config, self.card, self.usable, self.tracing
        return Family(*given, self.rules)

    def _fastest(self, family: Family, plans: list[Plan]) -> tuple[Plan, Trace] | None:
        """The first plan whose own trace fits; slower or too large plans go to `others`."""
        chosen: tuple[Plan, Trace] | None = None
        composed = ratio = 1.0
        queue = sorted(plans, key=_score)
        while queue:
            plan = queue.pop(0)
            reason = self._lacks(plan)
            if chosen is None and not reason:
                traced, trace = family.traced(plan)
                reason = self._lacks(traced)
                if not reason:
                    chosen = traced, trace
                    composed, ratio = plan.ms, traced.ms / plan.ms
                    continue
                smaller = family.smaller(plan, traced.reserved - self.usable)
                if smaller is not None:
                    queue = sorted([*queue, smaller], key=_score)
                    continue
                plan = traced
            elif chosen is not None and not reason:
                slower = plan.ms / composed - 1
                reason = f"{slower:.0%} slower" if slower > 0.005 else "no faster"
                if slower < -0.005:
                    reason = f"only {-slower:.0%} faster"
            self.others.append(Loser(plan if plan.traced else plan._replace(ms=ratio * plan.ms), reason))
        return chosen

    def _chosen(self, plan: Plan, trace: Trace) -> PlanResult:
        others = sorted(self.others, key=lambda loser: (bool(self._lacks(loser.plan)), loser.plan.ms))
        stages = {
            "prepare": preparing(self.config, self.vae),
            "previews": previewing(self.config, plan, self.vae),
        }
        how = how_to_prepare(self.config, self.vae, self.usable)
        card, host = self.card, self.host
        return PlanResult(card, self.vram, self.usable, host, plan, trace, others, stages, how, "", 0)

    def _lacks(self, plan: Plan) -> str:
        """Why a plan does not fit, or an empty text."""
        if plan.reserved > self.usable:
            return f"needs {(plan.reserved - self.usable) / GIB:.2f} GiB more on the card"
        missing = self._peak(plan) - self.usable
        if missing > 0:
            return _no_ram(plan, self.host) or f"needs {missing / GIB:.2f} GiB more for a preview's VAE"
        return _no_ram(plan, self.host)

    def _peak(self, plan: Plan) -> int:
        """Most bytes that the step and the config's previews reserve."""
        if not self.config.preview.prompts:
            return plan.reserved
        beside = plan.reserved - plan.peak
        return max(plan.reserved, previewing(self.config, plan, self.vae) + beside)

    def _advice(self, smallest: Plan, plans: list[Plan]) -> tuple[str, int]:
        """The smallest change that would fit: a setting given up, fewer pairs, a smaller image, more memory.

        Args:
            plans: all plans; where the smallest lacks system RAM, all do.

        Returns:
            The advice, and the bytes of GPU memory that would be enough without it; 0 where system RAM is
            missing.
        """
        lacks_ram = _no_ram(smallest, self.host)
        enough = 0 if lacks_ram else vram_for(self._peak(smallest))
        for changed, words in self._attempts():
            family = self._family(changed, {})
            plan = family.frugal()
            if _no_ram(plan, self.host):  # the plan with least GPU memory may need most RAM
                plan = next((plan for plan in family.plans() if not self._lacks(plan)), plan)
            if not self._lacks(plan):
                return f"{words} would fit ({plan.name}, {plan.peak / GIB:.2f} GiB)", enough
        on_card = [plan for plan in plans if self._peak(plan) <= self.usable]
        if lacks_ram and on_card:
            plan = min(on_card, key=lambda plan: _ram_for(plan, self.host))
            need, there = size_text(_ram_for(plan, self.host)), size_text(self.host.ram)
            return f"{need} of system RAM would do ({plan.name}), {there} are free", 0
        return f"the smallest plan ({smallest.name}) {lacks_ram or self._lacks(smallest)}", enough

    def _attempts(self) -> Iterator[tuple[Config, str]]:
        config, train = self.config, self.config.train
        if config.speed.cuda_graph:
            yield with_settings(config, {"speed.cuda_graph": False}), "speed.cuda_graph = false"
        for name, value in stated(config).items():
            yield _without(config, name), f"without {name} = {json.dumps(value)}"
        smaller = OPTIMIZERS[config.optim.name].smaller
        if config.adapter.kind == "full" and smaller is not None:
            yield with_settings(config, {"optim.name": smaller}), f"optim.name = {json.dumps(smaller)}"
        if train.pairs_per_batch > 1:
            yield with_settings(config, {"train.pairs_per_batch": 1}), "train.pairs_per_batch = 1"
        if train.accumulation > 1 and config.adapter.kind == "full":
            one = with_settings(config, {"train.accumulation": 1})
            yield one, "train.accumulation = 1, which the fused step needs,"
        for side in (768, 512):
            if config.data.bucket_step <= side < config.data.resolution:
                yield with_settings(config, {"data.resolution": side}), f"data.resolution = {side}"


def _score(plan: Plan) -> float:
    return plan.ms * (1 + BOTHER * sum(v in ("cpu", True) for k, v in plan.settings.items() if k != BLOCKS))


def _no_ram(plan: Plan, host: Host) -> str:
    """Why a plan does not fit system RAM, or an empty text."""
    if plan.pinned > host.pinnable:
        return f"pins {plan.pinned / GIB:.1f} GiB of system RAM, {host.pinnable / GIB:.1f} can be"
    if plan.host > host.ram:
        return f"needs {plan.host / GIB:.1f} GiB of system RAM, {host.ram / GIB:.1f} are free"
    return ""


def _ram_for(plan: Plan, host: Host) -> int:
    """System RAM that a plan needs, if as large a share of it can be pinned."""
    return max(plan.host, plan.pinned * host.ram // max(1, host.pinnable) + 1)


def _without(config: Config, name: str) -> Config:
    """The config with a set value removed."""
    table = json.loads(config.model_dump_json(exclude_unset=True))
    section, key = name.split(".")
    del table[section][key]
    return parse_config(table, where="plan")


def _variants(config: Config) -> Iterator[dict[str, Any]]:
    """Changes to what is computed, none first."""
    yield {}
    if config.adapter.kind == "lora":
        if "base" not in config.adapter.model_fields_set and config.offload.weights == "gpu":
            yield {"adapter.base": "int8"}
            yield {"adapter.base": "nf4"}
        return
    changes: dict[str, Any] = {}
    smaller = OPTIMIZERS[config.optim.name].smaller
    if smaller is not None and "name" not in config.optim.model_fields_set:
        changes["optim.name"] = smaller
        yield dict(changes)
    rounds = OPTIMIZERS[changes.get("optim.name", config.optim.name)].rounds_stochastically
    if rounds and config.train.precision == "bf16" and "precision" not in config.train.model_fields_set:
        yield changes | {"train.precision": "pure_bf16"}
