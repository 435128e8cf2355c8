"""All plans that compute the same, composed from a handful of traces of full steps.

For every combination of the discrete settings (`settings/rules.py`) the blocks whose recomputation costs most
time for a byte are freed from it as long as memory lasts (`windows.py`). The first trace is that of the most
frugal combination: if it does not fit, none does, and the other traces are not needed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mapo_fast.engine.layouts import below
from mapo_fast.hardware.allocator import EXPANDABLE, Rules
from mapo_fast.hardware.cards import Card
from mapo_fast.hardware.host import highest
from mapo_fast.planner.plan import GRAPHS, Plan
from mapo_fast.planner.replay import Allocator, cublas_workspace
from mapo_fast.planner.store import Tracing
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import Trace
from mapo_fast.planner.windows import Mode, compose, cut, savings
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.rules import NAMES, work
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import planned, value_of

BLOCKS = "train.gradient_checkpointing"
CHOICES = {name: values for name, values in planned("exact").items() if name != BLOCKS}
SDXL_PARAMETERS = 2_567_463_684
SLACK = 1 / 256
"""Share of the usable bytes kept free when blocks are freed from recomputation: composed figures err."""


def stated(config: Config) -> dict[str, Any]:
    """The settings of a plan that the config sets, with their values."""
    names = config.stated
    return {name: value_of(config, name) for name in planned("exact") if name in names}


class Family:
    """All plans that compute the same: one variant's traces, and the plans composed from them."""

    def __init__(
        self,
        config: Config,
        changes: dict[str, Any],
        unet_config: dict[str, Any],
        card: Card,
        usable: int,
        tracing: Tracing,
        rules: Rules = EXPANDABLE,
    ) -> None:
        self.config, self.changes = with_settings(config, changes), changes
        workspace = cublas_workspace(card.capability)
        self.allocator = Allocator(rules, workspace, graphs=self.config.speed.cuda_graph)
        self.unet_config, self.card, self.usable, self.tracing = unet_config, card, usable, tracing
        self.stated = stated(config)
        self.full = self.config.adapter.kind == "full"
        self.blocks = self.stated.get(BLOCKS) or (False if BLOCKS in self.stated else None)
        """Blocks to recompute if set in the config: all, none, or by name; else None."""
        self.combinations = self._sensible()
        self.names = self._needed()
        configs = [self._config(self._settings(name)) for name in self.names]
        self._coming = tracing.traces(configs, unet_config)
        self.traces: dict[str, Trace] = {}
        self._overheads: dict[str, int] = {}

    def _sensible(self) -> list[dict[str, Any]]:
        """The combinations that work and are not dominated by another on every card."""
        known = {name: value_of(self.config, name) for name in NAMES} | {BLOCKS: self.blocks is not False}
        values = [
            (self.stated[name],) if name in self.stated else options for name, options in CHOICES.items()
        ]
        every = (dict(zip(CHOICES, picks, strict=True)) for picks in itertools.product(*values))
        working = [settings for settings in every if work({**known, **settings})]
        if "train.layout" in self.stated:
            return working
        fused = self.full and any(settings["train.fused_step"] for settings in working)
        return [settings for settings in working if not self._beaten(settings, fused)]

    def _beaten(self, settings: dict[str, Any], fused: bool) -> bool:
        """Whether a combination is dominated on every card, for one of three reasons.

        1. `joint` with recomputation, because `split` recomputes as much and needs less memory.
        2. `sequential` in a full fine-tune that can fuse its step, or with offloaded activations, because
           `split` is as small and faster.
        3. A fused step of a LoRA, because its gradients and optimizer states are negligible.
        """
        asked = {"train.fused_step", "offload.optimizer"} & self.stated.keys()
        if settings["train.fused_step"] and not self.full and not asked:
            return True
        layout, away = settings["train.layout"], settings["offload.activations"] == "cpu"
        if layout == "joint":
            return away or bool(self.blocks)
        return layout == "sequential" and (fused or away)

    def _needed(self) -> list[str]:
        """Names of the modes that the combinations are composed from: layout, and what is recomputed.

        One mode is without offload and one with everything offloaded that may be, to measure the transfers.
        """
        names = dict.fromkeys(name for settings in self.combinations for name in self._modes(settings))
        moving = [s for s in self.combinations if "cpu" in (s["offload.weights"], s["offload.optimizer"])]
        if moving and not any(name.endswith("offloaded") for name in names):
            names[f"{moving[0]['train.layout']} offloaded"] = None
        if names and all(name.endswith("offloaded") for name in names):
            names[f"{self.combinations[0]['train.layout']} checkpointed"] = None
        return sorted(names, key=lambda name: "offloaded" not in name)  # the longest first: two run at a time

    def _modes(self, settings: dict[str, Any]) -> list[str]:
        """Modes of blocks under a combination: plain, then recomputed."""
        layout = settings["train.layout"]
        names = [] if self.blocks is True else [_plain(layout)]
        if self.blocks is not False and (layout != "joint" or "train.layout" in self.stated):
            names.append(_recomputed(settings))
        return names

    def _settings(self, name: str) -> dict[str, Any]:
        """Settings of a mode's trace: fused if allowed; `offloaded` with everything offloaded that may be."""
        layout, how = name.split(" ")
        alike = [s for s in self.combinations if _plain(s["train.layout"]) == _plain(layout)]
        settings = {key: max((s[key] for s in alike), key=values.index) for key, values in CHOICES.items()}
        if how != "offloaded":
            settings |= {key: "gpu" for key in settings if key.startswith("offload.")}
        return {**settings, "train.layout": layout, BLOCKS: how != "plain" and self.blocks is not False}

    def _config(self, settings: dict[str, Any]) -> Config:
        return with_settings(self.config, settings)

    # --- Combinations ---

    def frugal(self) -> Plan:
        """The plan with everything offloaded and recomputed that may be; takes one trace."""
        name = self.names[0]
        self.traces[name] = next(self._coming)
        blocks = {BLOCKS: list(self.blocks)} if isinstance(self.blocks, tuple) else {}
        plan = Plan({**self._settings(name), **blocks, **self.changes}, {}, 0, 0, 0, 0, 0.0, traced=False)
        return self._measured(plan, self.traces[name])._replace(traced=not blocks)

    def least(self) -> int:
        """Lower bound of all plans' bytes; call `frugal` first.

        Buffers that offloaded things visit do not count: they may be larger than the things.
        """
        trace = self.traces[self.names[0]]
        if self.names[0].endswith("offloaded"):
            return int((trace.device - trace.row("staging")).max())
        return int((trace.row("parameters") + trace.row("states")).max())

    def plans(self) -> list[Plan]:
        """One plan for each combination of discrete settings, with its best choice of blocks."""
        self.traces |= dict(zip(self.names[1:], self._coming, strict=True))
        room = int(self.usable * (1 - SLACK))
        found = (self._best(settings, room) for settings in self.combinations)
        return [plan for plan in found if plan is not None]

    def give_up(self) -> None:
        """Make no more traces."""
        self._coming.close()

    def smaller(self, plan: Plan, excess: int) -> Plan | None:
        """The plan with more recomputation, after its trace was this many bytes too large."""
        settings = {name: plan.settings[name] for name in CHOICES}
        found = self._best(settings, plan.reserved - excess)
        return found if found is not None and found.peak < plan.peak else None

    def _overhead(self, name: str) -> int:
        """Bytes that the allocator reserves on top of the tensors of a mode's trace."""
        if name not in self._overheads:
            trace = self.traces[name]
            peak = trace.peak + sum(self._graphs(trace.peak - trace.lasting).values())
            self._overheads[name] = max(0, self.tracing.replays.least(trace, self.allocator) - peak)
        return self._overheads[name]

    def _best(self, settings: dict[str, Any], room: int) -> Plan | None:
        """A combination's plan; None where another combination has the same.

        Args:
            room: bytes that it may reserve.
        """
        layout = settings["train.layout"]
        keep = not settings["train.fused_step"]
        names = self._modes(settings)
        modes = {name: cut(self.traces[name], self.card, keep_gradients=keep) for name in names}
        lasting = self._lasting(settings)
        room -= sum(lasting.device.values()) + self._overhead(names[-1])
        if self.config.speed.cuda_graph:
            room //= 2  # a step's own memory, and as much again
        plain, recomputed = _plain(layout), _recomputed(settings)

        def made(blocks: Any, free: Collection[str], default: str) -> Plan:
            return self._plan(settings, blocks, modes, dict.fromkeys(free, plain), default, lasting)

        if recomputed not in modes:
            return made(False, (), plain)
        names_of = {piece.block for piece in modes[recomputed].pieces.values() if piece.block}
        if isinstance(self.blocks, tuple):
            free = {b for b in names_of if not below(b, self.blocks)}
            return made(list(self.blocks), free, recomputed)
        if self.blocks:
            return made(True, (), recomputed)
        kept = settings["offload.activations"] == "gpu" and layout != "split"
        if kept and compose(modes, {}, plain).peak <= room:
            return made(False, (), plain)
        free = self._freed(modes, plain, recomputed, room)
        if free == names_of:
            if self.stated.get("train.layout") != "split" and self.stated.get("offload.activations") != "cpu":
                return None
            free -= {max(free)}  # `split` and offloaded inputs are of blocks that are recomputed
        return made(True if not free else prefixes(names_of - free, names_of), free, recomputed)

    def _freed(self, modes: Mapping[str, Mode], plain: str, recomputed: str, room: int) -> set[str]:
        """Names of the blocks that need not be recomputed."""
        freed: dict[str, str] = {}
        if compose(modes, freed, recomputed).peak > room:
            return set()
        for block in savings(modes[plain], modes[recomputed]):
            attempt = freed | {block: plain}
            if compose(modes, attempt, recomputed).peak <= room:
                freed = attempt
        return set(freed)

    def _trace(self, *, offloaded: bool) -> Trace | None:
        return next((t for name, t in self.traces.items() if name.endswith("offloaded") == offloaded), None)

    def _moved(self, category: str) -> int:
        """Device bytes that the trace with offload saves."""
        here, away = self._trace(offloaded=False), self._trace(offloaded=True)
        return 0 if here is None or away is None else int(here.row(category).max() - away.row(category).max())

    def _lasting(self, settings: dict[str, Any]) -> _Lasting:
        """Bytes on the device and in pinned memory throughout a step."""
        here, away = self._trace(offloaded=False), self._trace(offloaded=True)
        assert here is not None
        device = {name: int(here.row(name).max()) for name in ("parameters", "states")}
        device["staging"] = int(here.row("staging").min())
        weights = self._moved("parameters") if settings["offload.weights"] == "cpu" else 0
        states = self._moved("states") if settings["offload.optimizer"] == "cpu" else 0
        if away is not None and settings["offload.weights"] == "cpu":
            device["staging"] += away.slots
        if away is not None and settings["offload.optimizer"] == "cpu":
            device["staging"] += int(away.row("staging").min()) - away.slots
        device["parameters"] -= weights
        device["states"] -= states
        return _Lasting(device, weights, states)

    def _plan(
        self,
        settings: dict[str, Any],
        blocks: Any,
        modes: Mapping[str, Mode],
        chosen: Mapping[str, str],
        default: str,
        lasting: _Lasting,
    ) -> Plan:
        made = compose(modes, chosen, default)
        rates, reference = self.card.rates, self.config.reference
        moved = 0
        if settings["offload.activations"] == "cpu":
            pinned_there = int(self.traces[default].row("host").max())
            moved = max(0, pinned_there - self._moved("parameters") - self._moved("states"))
        # A frozen copy streams as much as the UNet, in forward only; a LoRA's reference is that UNet again.
        unet = lasting.weights // 2 if reference == "copy" else lasting.weights
        unet *= 2 if settings["train.layout"] == "sequential" else 1
        times = self.config.train.accumulation
        forward_in = times * (2 * unet if reference in ("adapter", "copy") else unet)
        backward_in = times * (unet + moved) + lasting.states
        stored = times * (unet if self.full else 0) + lasting.states
        seconds = max(made.forward, forward_in / rates.fetch, times * moved / rates.store)
        seconds += max(made.backward, backward_in / rates.fetch, stored / rates.store)
        pinned = lasting.weights + lasting.states + moved
        device = {**lasting.device, "activations and gradients": made.peak, **self._graphs(made.peak)}
        average = self._average(self.traces[default])
        return Plan(
            {**settings, BLOCKS: blocks, **self.changes},
            device,
            sum(device.values()),
            sum(device.values()) + self._overhead(default),
            pinned,
            highest(pinned, self._loaded()) + average.ram,
            1e3 * seconds + average.ms,
            traced=False,
            changes=tuple(f"{name} = {json.dumps(value)}" for name, value in self.changes.items()),
            accumulation=times,
        )

    def _average(self, trace: Trace) -> _Average:
        """Costs of `[ema]`: the average in RAM, and the weights while it is in their place."""
        ema = self.config.ema
        weights = trace.trainable * (2 if self.config.train.precision == "pure_bf16" else 4)
        if ema.half_life is None:
            return _Average(0, 0.0)
        return _Average(4 * trace.trainable + weights, 1e3 * weights / self.card.rates.store / ema.every)

    def _graphs(self, made: int) -> dict[str, int]:
        """Bytes of the CUDA graphs' pool, if there are any: a step's own memory, on top of eager work's."""
        return {GRAPHS: made} if self.config.speed.cuda_graph else {}

    def _loaded(self) -> int:
        """Bytes of the UNet on the CPU before it is moved, quantised or streamed."""
        if self.config.adapter.base != "dense":
            return 2 * SDXL_PARAMETERS
        unets = 2 if self.config.reference == "copy" else 1  # loaded one after the other
        here = self._trace(offloaded=False)
        if here is not None:
            return int(here.row("parameters").max()) // unets
        (away,) = self.traces.values()
        return int(away.row("parameters").max() + away.row("host").max()) // unets

    def traced(self, plan: Plan) -> tuple[Plan, Trace]:
        """The plan with the figures of its own full trace, and the trace."""
        (trace,) = self.tracing.traces([self._config(plan.settings)], self.unet_config)
        return self._measured(plan, trace), trace

    def _measured(self, plan: Plan, trace: Trace) -> Plan:
        at_peak = trace.at_peak()
        pinned = at_peak.pop("host")
        graphs, average = self._graphs(trace.peak - trace.lasting), self._average(trace)
        return plan._replace(
            device=at_peak | graphs,
            peak=trace.peak + sum(graphs.values()),
            reserved=self.tracing.replays.needed(trace, self.allocator, self.usable),
            pinned=pinned,
            host=highest(pinned, self._loaded()) + average.ram,
            ms=simulate(trace, self.card).step + average.ms,
            traced=True,
            accumulation=trace.accumulation,
            changes=tuple(f"{name} = {json.dumps(value)}" for name, value in self.changes.items()),
        )


def _plain(layout: str) -> str:
    return f"{'sequential' if layout == 'sequential' else 'joint'} plain"


def _recomputed(settings: Mapping[str, Any]) -> str:
    away = settings["offload.activations"] == "cpu"
    return f"{settings['train.layout']} {'offloaded' if away else 'checkpointed'}"


class _Average(NamedTuple):
    """What an average of the weights costs."""

    ram: int
    """Bytes of system RAM."""
    ms: float
    """Milliseconds a step."""


class _Lasting(NamedTuple):
    """Bytes that are in use throughout a step."""

    device: dict[str, int]
    weights: int
    """Bytes of weights streamed from pinned memory."""
    states: int
    """Bytes of optimizer state streamed from pinned memory."""


def prefixes(chosen: set[str], blocks: set[str]) -> list[str]:
    """The shortest list of name prefixes that match exactly the chosen blocks."""
    found = []

    def visit(prefix: str) -> None:
        below = {b for b in blocks if f"{b}.".startswith(f"{prefix}.")}
        if not below & chosen:
            return
        if below <= chosen:
            found.append(prefix)
            return
        length = prefix.count(".") + 2
        for child in sorted({".".join(b.split(".")[:length]) for b in below}):
            visit(child)

    for root in sorted({b.split(".")[0] for b in blocks}):
        visit(root)
    return found
