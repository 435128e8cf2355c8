"""A plan: values for settings, with their memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mapo_fast.hardware.cards import Card
from mapo_fast.hardware.host import Host
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config

if TYPE_CHECKING:  # it imports torch, which a plan that is looked up does without
    from mapo_fast.planner.trace import Trace

GIB = 2**30
GRAPHS = "graph buffers"
"""Name of the memory that CUDA graphs keep reserved, in a plan."""


class Plan(NamedTuple):
    """Settings, with the predicted memory and time of their step."""

    settings: dict[str, Any]
    """`section.key` → value of all settings that the planner may choose and the config leaves unset."""
    device: dict[str, int]
    """Bytes on the device at the step's peak, by category."""
    peak: int
    """Sum of `parts`, without CUDA context and workspaces."""
    reserved: int
    """Most bytes that torch's allocator reserves, with cuBLAS' workspaces (`replay.py`)."""
    pinned: int
    """Bytes of host memory that transfers go to and come from."""
    host: int
    """Most bytes of host memory, with loading and saving."""
    ms: float
    traced: bool
    """Whether the figures come from a full trace of this plan, not composed from other traces."""
    changes: tuple[str, ...] = ()
    """Settings that change what is computed."""
    accumulation: int = 1
    """Micro-batches in a step."""

    def apply(self, config: Config) -> Config:
        """The config with this plan's settings."""
        return with_settings(config, self.settings, "plan")

    @property
    def time(self) -> str:
        """Time of a step, as text."""
        if self.accumulation == 1:
            return f"{seconds_text(self.ms / 1e3)} a step"
        each = seconds_text(self.ms / 1e3 / self.accumulation)
        return f"{seconds_text(self.ms / 1e3)} a step of {self.accumulation} micro-batches ({each} each)"

    @property
    def name(self) -> str:
        """Short description of how the plan trains."""
        values = {name: self.settings[name] for name in WORDS if name in self.settings}
        words = [in_words(name, value) for name, value in values.items() if value not in (False, "gpu")]
        if values.get("train.gradient_checkpointing") is False:
            words.insert(1, in_words("train.gradient_checkpointing", False))
        return ", ".join([*words, *self.changes])


WORDS: dict[str, dict[Any, str]] = {
    "train.layout": {
        "joint": "both images at once",
        "split": "one image at a time in each block",
        "sequential": "one image at a time",
    },
    "train.gradient_checkpointing": {True: "activations recomputed", False: "activations kept"},
    "train.fused_step": {
        True: "weights updated in the backward pass",
        False: "weights updated after the backward pass",
    },
    "offload.optimizer": {"gpu": "optimizer states on the card", "cpu": "optimizer states in system RAM"},
    "offload.weights": {"gpu": "weights on the card", "cpu": "weights in system RAM"},
    "offload.activations": {"gpu": "activations on the card", "cpu": "activations in system RAM"},
}
"""Effects of the values of planned settings, in words."""


def in_words(name: str, value: Any) -> str:
    """Effect of a planned setting in words; empty for settings without a description."""
    if isinstance(value, (list, tuple)):
        return "some activations recomputed"
    return WORDS.get(name, {}).get(value, "")


def seconds_text(seconds: float) -> str:
    """A time as people say it: "0.85 s", "12 s", "3 min", "1 h 27 min", "2 d 5 h"."""
    if seconds < 59.5:
        return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


class Loser(NamedTuple):
    """A plan that was not chosen."""

    plan: Plan
    """The plan; its time is corrected by the factor that the chosen plan's own trace gave."""
    reason: str


@dataclass(frozen=True)
class PlanResult:
    """The planner's result; all figures are predictions."""

    card: Card
    vram: int
    usable: int
    """Bytes that a plan may reserve."""
    host: Host
    chosen: Plan | None
    trace: Trace | None
    """Trace of the chosen plan; None where the plan was looked up."""
    others: list[Loser]
    stages: dict[str, int]
    """Peak bytes of the run's other stages on the device, see `stages.py`."""
    how_to_prepare: str
    """Settings with which `prepare` fits, where it does not fit as configured."""
    advice: str
    """The smallest change with which a plan would fit, where none does."""
    enough: int
    """Bytes of GPU memory that would be enough, where nothing fits; 0 where no amount would be."""
