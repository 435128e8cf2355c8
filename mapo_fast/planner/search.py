"""The fastest plan that fits.

Settings that the config states are kept; the planner chooses the others:

    train.layout, train.gradient_checkpointing (block by block), train.fused_step, offload.*

All of these give the same gradients. Only where none of them fits is something proposed that changes what is
computed: AdamW with 8-bit states, bf16 weights without fp32 masters, a quantised base beside a LoRA.

For every combination of the discrete settings the blocks whose recomputation costs most time for a byte are
freed from it as long as memory lasts. Peaks and times are composed from a handful of traces (`windows.py`);
the fastest plan is then traced itself, and the next one if it does not keep what was promised.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mapo_fast.config import Config, parse_config
from mapo_fast.errors import UserError
from mapo_fast.planner.cards import GIB, Card, usable_bytes
from mapo_fast.planner.host import Host, highest
from mapo_fast.planner.plan import Plan, with_settings
from mapo_fast.planner.stages import SDXL_VAE, Vae, preparing, previewing
from mapo_fast.planner.store import traces
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import Trace
from mapo_fast.planner.windows import Mode, compose, cut, savings

CHOICES: dict[str, tuple[Any, ...]] = {
    "train.layout": ("joint", "split", "sequential"),
    "train.fused_step": (False, True),
    "offload.optimizer": ("gpu", "cpu"),
    "offload.weights": ("gpu", "cpu"),
    "offload.activations": ("gpu", "cpu"),
}
BLOCKS = "train.gradient_checkpointing"
SDXL_PARAMETERS = 2_567_463_684
BOTHER = 0.01
"""A plan has to be this much faster for everything that it moves off the card, and for fusing the step."""


class Loser(NamedTuple):
    """A plan that was not chosen."""

    plan: Plan
    """Its time is corrected as the chosen plan's own trace has corrected that one's."""
    reason: str


class Outcome(NamedTuple):
    """What the search found."""

    card: Card
    vram: int
    usable: int
    """Bytes that a plan's peak may have."""
    host: Host
    chosen: Plan | None
    trace: Trace | None
    """Of the chosen plan."""
    others: list[Loser]
    stages: dict[str, int]
    """Peak bytes of the run's other stages on the device, see `stages.py`."""
    advice: str
    """The smallest change that would fit, where nothing does."""


def search(
    config: Config,
    unet_config: dict[str, Any],
    card: Card,
    vram: int,
    host: Host,
    *,
    vae: Vae = SDXL_VAE,
    advise: bool = True,
) -> Outcome:
    """Choose a plan for training `config`'s UNet on a card with `vram` bytes of free memory."""
    usable = usable_bytes(vram)

    def too_much(plan: Plan) -> str:
        return _too_much(plan, usable, host) or _no_preview(config, plan, usable, vae)

    others: list[Loser] = []
    smallest: Plan | None = None
    for changes in _variants(config):
        family = _Family(config, changes, unet_config, card, usable)
        plans = sorted(family.plans(), key=lambda plan: plan.ms * (1 + BOTHER * _bother(plan)))
        smallest = min([*plans, *([smallest] if smallest else [])], key=lambda plan: plan.peak, default=None)
        chosen: Plan | None = None
        composed = ratio = 1.0
        for plan in plans:
            reason = too_much(plan)
            if chosen is None and not reason:
                traced, trace = family.traced(plan)
                reason = too_much(traced)
                if not reason:
                    chosen, chosen_trace = traced, trace
                    composed, ratio = plan.ms, traced.ms / plan.ms
                    continue
                plan = traced
            elif chosen is not None and not reason:
                slower = plan.ms / composed - 1
                reason = f"{slower:.0%} slower" if slower > 0.005 else "no faster"
            others.append(Loser(plan if plan.traced else plan._replace(ms=ratio * plan.ms), reason))
        if chosen is not None:
            fitting = sorted(others, key=lambda loser: (bool(too_much(loser.plan)), loser.plan.ms))
            stages = {"prepare": preparing(config, vae), "previews": previewing(config, chosen, vae)}
            return Outcome(card, vram, usable, host, chosen, chosen_trace, fitting, stages, "")
    advice = _advice(config, unet_config, card, vram, host, smallest) if advise else ""
    return Outcome(card, vram, usable, host, None, None, others, {}, advice)


def stated(config: Config) -> dict[str, Any]:
    """The settings of a plan that the config states, with their values."""
    found = {}
    for name in (*CHOICES, BLOCKS):
        section, key = name.split(".")
        part = getattr(config, section)
        if key in part.model_fields_set:
            found[name] = getattr(part, key)
    return found


def _variants(config: Config) -> Iterator[dict[str, Any]]:
    """Changes to what is computed, none first."""
    yield {}
    if config.adapter.kind == "lora":
        if "base" not in config.adapter.model_fields_set and config.offload.weights == "gpu":
            yield {"adapter.base": "int8"}
            yield {"adapter.base": "nf4"}
        return
    changes: dict[str, Any] = {}
    if config.optim.name != "adamw8bit" and "name" not in config.optim.model_fields_set:
        changes["optim.name"] = "adamw8bit"
        yield dict(changes)
    eight_bit = config.optim.name == "adamw8bit" or changes
    if eight_bit and config.train.precision == "bf16" and "precision" not in config.train.model_fields_set:
        yield changes | {"train.precision": "pure_bf16"}


class _Family:
    """All plans that compute the same: one variant's traces, and what is composed from them."""

    def __init__(
        self, config: Config, changes: dict[str, Any], unet_config: dict[str, Any], card: Card, usable: int
    ) -> None:
        self.config, self.changes = with_settings(config, changes), changes
        self.unet_config, self.card, self.usable = unet_config, card, usable
        self.stated = stated(config)
        train = self.config.train
        self.full = self.config.adapter.kind == "full"
        self.fusable = (
            self.stated.get("train.fused_step", self.full)
            and train.accumulation == 1
            and train.precision != "fp16"
            and self.config.optim.name != "paged_adamw8bit"
        )
        self.streamable = self.config.adapter.base == "dense" and (self.fusable or not self.full)
        names = self._needed()
        configs = [self._config(self._settings(name)) for name in names]
        made = traces(configs, unet_config, settled=False)
        self.traces = dict(zip(names, made, strict=True))

    def _needed(self) -> list[str]:
        """Names of the modes whose traces the combinations need: what halves do, and what is recomputed.

        Where nothing is stated, `joint` recomputes nothing (`split` recomputes as much and needs less), and
        what `sequential` leaves to offload is not worth a trace.
        """
        layouts = [self.stated["train.layout"]] if "train.layout" in self.stated else ["split"]
        blocks = self.stated.get(BLOCKS)
        if "train.layout" not in self.stated and (not self.full or not self.fusable):
            layouts.append("sequential")
        names = [] if blocks is True or "train.layout" in self.stated else ["joint plain"]
        for layout in layouts:
            plain = "sequential" if layout == "sequential" else "joint"
            if blocks is not True and f"{plain} plain" not in names:
                names.append(f"{plain} plain")
            if blocks is not False:
                names.append(f"{layout} checkpointed")
                offloads = [
                    self.stated.get(f"offload.{part}") for part in ("optimizer", "weights", "activations")
                ]
                wanted = layout == "split" or "train.layout" in self.stated
                if layout != "joint" and wanted and offloads != ["gpu"] * 3:
                    names.append(f"{layout} offloaded")
        return sorted(names, key=lambda name: "offloaded" not in name)  # the longest first: two run at a time

    def _settings(self, name: str) -> dict[str, Any]:
        layout, how = name.split(" ")
        away = how == "offloaded"
        return {
            "train.layout": layout,
            BLOCKS: how != "plain",
            "train.fused_step": bool(self.fusable and layout != "sequential"),
            "offload.activations": "cpu" if away else "gpu",
            "offload.weights": "cpu" if away and self.streamable and layout != "sequential" else "gpu",
            "offload.optimizer": "cpu" if away and self.fusable and layout != "sequential" else "gpu",
        }

    def _config(self, settings: dict[str, Any]) -> Config:
        return with_settings(self.config, settings)

    # --- Combinations ---

    def plans(self) -> Iterator[Plan]:
        """One for each combination of discrete settings that is possible, with its best choice of blocks."""
        values = [
            (self.stated[name],) if name in self.stated else options for name, options in CHOICES.items()
        ]
        for combination in itertools.product(*values):
            settings = dict(zip(CHOICES, combination, strict=True))
            if self._sensible(settings):
                yield from self._best(settings)

    def _sensible(self, settings: dict[str, Any]) -> bool:
        """Whether the combination works, and is not beaten by another whatever the card."""
        fused, layout = settings["train.fused_step"], settings["train.layout"]
        away = settings["offload.activations"] == "cpu"
        if fused and (not self.fusable or layout == "sequential"):
            return False
        if settings["offload.optimizer"] == "cpu" and not fused:
            return False
        if settings["offload.weights"] == "cpu":
            if not self.streamable or layout == "sequential":
                return False
            if self.full and settings["offload.optimizer"] == "gpu":
                return False
        return f"{layout} {'offloaded' if away else 'checkpointed'}" in self.traces or (
            not away and f"{'sequential' if layout == 'sequential' else 'joint'} plain" in self.traces
        )

    def _best(self, settings: dict[str, Any]) -> Iterator[Plan]:
        layout = settings["train.layout"]
        keep = not settings["train.fused_step"]
        how = "offloaded" if settings["offload.activations"] == "cpu" else "checkpointed"
        plain = f"{'sequential' if layout == 'sequential' else 'joint'} plain"
        recomputed = f"{layout} {how}"
        modes = {
            name: cut(self.traces[name], self.card, keep_gradients=keep)
            for name in (plain, recomputed)
            if name in self.traces
        }
        lasting = self._lasting(settings)
        if lasting is None:
            return
        fixed = sum(lasting.device.values())
        blocks = self.stated.get(BLOCKS)
        if recomputed not in modes or (
            blocks is None and how == "checkpointed" and self._fits(modes, plain, fixed)
        ):
            if layout != "split" and not isinstance(blocks, (list, tuple)):
                yield self._plan(settings, False, modes, {}, plain, lasting)
            return
        names = {piece.block for piece in modes[recomputed].pieces.values() if piece.block}
        if isinstance(blocks, (list, tuple)):
            free = {b for b in names if not any(f"{b}.".startswith(f"{prefix}.") for prefix in blocks)}
            value: Any = list(blocks)
        else:
            free = set() if blocks or plain not in modes else self._freed(modes, plain, recomputed, fixed)
            if free == names:
                return  # nothing is checkpointed: another combination's plan
            value = True if not free else prefixes(names - free, names)
        yield self._plan(settings, value, modes, dict.fromkeys(free, plain), recomputed, lasting)

    def _fits(self, modes: Mapping[str, Mode], default: str, fixed: int) -> bool:
        return default in modes and fixed + compose(modes, {}, default).peak <= self.usable

    def _freed(self, modes: Mapping[str, Mode], plain: str, recomputed: str, fixed: int) -> set[str]:
        """Blocks that need not be recomputed."""
        freed: dict[str, str] = {}
        if fixed + compose(modes, freed, recomputed).peak > self.usable:
            return set()
        for block in savings(modes[plain], modes[recomputed]):
            attempt = freed | {block: plain}
            if fixed + compose(modes, attempt, recomputed).peak <= self.usable:
                freed = attempt
        return set(freed)

    def _lasting(self, settings: dict[str, Any]) -> _Lasting | None:
        """What lies on the device and in pinned memory throughout; None where no trace shows it."""
        here = next((t for name, t in self.traces.items() if not name.endswith("offloaded")), None)
        away = next((t for name, t in self.traces.items() if name.endswith("offloaded")), None)
        here = here or away
        assert here is not None
        device = {name: int(here.row(name).max()) for name in ("parameters", "states")}
        device["staging"] = int(here.row("staging").min())
        weights = states = 0
        if settings["offload.weights"] == "cpu" or settings["offload.optimizer"] == "cpu":
            if away is None:
                return None
            if settings["offload.weights"] == "cpu":
                resident = int(away.row("parameters").max())
                weights = device["parameters"] - resident
                device["parameters"] = resident
                device["staging"] += away.slots
            if settings["offload.optimizer"] == "cpu":
                resident = int(away.row("states").max())
                states = device["states"] - resident
                device["states"] = resident
                device["staging"] += int(away.row("staging").min()) - away.slots
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
        rates = self.card.rates
        moved = 0
        if settings["offload.activations"] == "cpu":
            away = self.traces[default]
            total = int(away.row("host").max())
            own = self._settings(default)
            moved = total - (
                lasting.weights or self._streamed(away) if own["offload.weights"] == "cpu" else 0
            )
            if own["offload.optimizer"] == "cpu":
                moved -= lasting.states or self._offloaded_states(away)
            moved = max(moved, 0)
        # A frozen copy streams as much as the UNet, in forward only; a LoRA's reference is that UNet again.
        unet = lasting.weights // 2 if self.config.reference == "copy" else lasting.weights
        forward_in = 2 * unet if self.config.reference in ("adapter", "copy") else unet
        backward_in = unet + lasting.states + moved
        stored = lasting.states + (unet if self.full else 0)
        seconds = max(made.forward, forward_in / rates.fetch, moved / rates.store)
        seconds += max(made.backward, backward_in / rates.fetch, stored / rates.store)
        pinned = lasting.weights + lasting.states + moved
        return Plan(
            {**settings, BLOCKS: blocks, **self.changes},
            {**lasting.device, "activations and gradients": made.peak},
            sum(lasting.device.values()) + made.peak,
            pinned,
            highest(pinned, self._loaded()),
            1e3 * seconds,
            traced=False,
            changes=tuple(f"{name} = {json.dumps(value)}" for name, value in self.changes.items()),
        )

    def _streamed(self, away: Trace) -> int:
        dense = next((t for name, t in self.traces.items() if not name.endswith("offloaded")), away)
        return int(dense.row("parameters").max()) - int(away.row("parameters").max())

    def _offloaded_states(self, away: Trace) -> int:
        dense = next((t for name, t in self.traces.items() if not name.endswith("offloaded")), away)
        return int(dense.row("states").max()) - int(away.row("states").max())

    def _loaded(self) -> int:
        """Bytes of the UNet on the CPU before it is moved, quantised or streamed."""
        trace = next(iter(self.traces.values()))
        if self.config.adapter.base == "dense":
            dense = next((t for name, t in self.traces.items() if not name.endswith("offloaded")), trace)
            unets = 2 if self.config.reference == "copy" else 1  # loaded one after the other
            return int(dense.row("parameters").max()) // unets
        return 2 * SDXL_PARAMETERS

    def traced(self, plan: Plan) -> tuple[Plan, Trace]:
        """The plan with the figures of its own full trace."""
        (trace,) = traces([with_settings(self.config, plan.settings)], self.unet_config)
        at_peak = trace.at_peak()
        pinned = at_peak.pop("host")
        return (
            plan._replace(
                device=at_peak,
                peak=trace.peak,
                pinned=pinned,
                host=highest(pinned, self._loaded()),
                ms=simulate(trace, self.card).step,
                traced=True,
            ),
            trace,
        )


class _Lasting(NamedTuple):
    """What is there throughout a step, in bytes."""

    device: dict[str, int]
    weights: int
    """Streamed from pinned memory."""
    states: int
    """Likewise."""


def _bother(plan: Plan) -> int:
    return sum(value in ("cpu", True) for name, value in plan.settings.items() if name != BLOCKS)


def _too_much(plan: Plan, usable: int, host: Host) -> str:
    """Why a plan does not fit, or an empty text."""
    if plan.peak > usable:
        return f"needs {(plan.peak - usable) / GIB:.2f} GiB more on the card"
    if plan.pinned > host.pinnable:
        return f"pins {plan.pinned / GIB:.1f} GiB of system RAM, {host.pinnable / GIB:.1f} can be"
    if plan.host > host.ram:
        return f"needs {plan.host / GIB:.1f} GiB of system RAM, there are {host.ram / GIB:.1f}"
    return ""


def _no_preview(config: Config, plan: Plan, usable: int, vae: Vae) -> str:
    """Why a plan leaves no room for the previews that the config asks for, or an empty text."""
    missing = previewing(config, plan, vae) - usable
    if not config.preview.prompts or missing <= 0:
        return ""
    return f"needs {missing / GIB:.2f} GiB more for a preview's VAE"


def _advice(
    config: Config, unet_config: dict[str, Any], card: Card, vram: int, host: Host, smallest: Plan | None
) -> str:
    """The smallest change that would fit: a setting given up, fewer pairs, a smaller image, more memory."""
    changes = [(name, value) for name, value in stated(config).items()]
    attempts = [(_without(config, name), f"without {name} = {json.dumps(value)}") for name, value in changes]
    if config.train.pairs_per_batch > 1:
        attempts.append((with_settings(config, {"train.pairs_per_batch": 1}), "train.pairs_per_batch = 1"))
    if config.train.accumulation > 1 and config.adapter.kind == "full":
        one = with_settings(config, {"train.accumulation": 1})
        attempts.append((one, "train.accumulation = 1, which the fused step needs,"))
    attempts += [
        (with_settings(config, {"data.resolution": side}), f"data.resolution = {side}")
        for side in (768, 512)
        if side < config.data.resolution
    ]
    for attempt, words in attempts:
        found = search(attempt, unet_config, card, vram, host, advise=False)
        if found.chosen is not None:
            return f"{words} would fit ({found.chosen.name}, {found.chosen.peak / GIB:.2f} GiB)"
    if smallest is None:
        return "no combination of the stated settings works"
    return f"the smallest plan ({smallest.name}) needs {smallest.peak / GIB:.2f} GiB beside the CUDA context"


def _without(config: Config, name: str) -> Config:
    """The config with a stated setting left open."""
    table = json.loads(config.model_dump_json(exclude_unset=True))
    section, key = name.split(".")
    del table[section][key]
    try:
        return parse_config(table, where="plan")
    except UserError:
        return config


def prefixes(chosen: set[str], blocks: set[str]) -> list[str]:
    """The shortest list of name prefixes that hold exactly these of the blocks."""
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
