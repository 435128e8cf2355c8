"""A plan: values for settings, with what they need."""

from __future__ import annotations

from typing import Any, NamedTuple

from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config

GIB = 2**30
GRAPHS = "graph buffers"
"""What a plan calls the memory that CUDA graphs keep reserved."""


class Plan(NamedTuple):
    """Settings and the step that they make, predicted."""

    settings: dict[str, Any]
    """`section.key` → value, of all that the planner may choose and the config leaves open."""
    device: dict[str, int]
    """Bytes on the device at the step's peak, by category."""
    peak: int
    """Their sum: no CUDA context, no workspaces."""
    reserved: int
    """Most bytes that torch's allocator reserves for them, with cuBLAS' workspaces (`replay.py`)."""
    pinned: int
    """Bytes of host memory that transfers go to and come from."""
    host: int
    """Most bytes of host memory, with loading and saving."""
    ms: float
    traced: bool
    """Whether the figures are those of a full trace of this plan; else it is composed of others' pieces."""
    changes: tuple[str, ...] = ()
    """Settings that change what is computed."""
    accumulation: int = 1
    """Micro-batches in a step."""

    def apply(self, config: Config) -> Config:
        """The config with this plan's settings."""
        return with_settings(config, self.settings, "plan")

    @property
    def time(self) -> str:
        """How long a step takes, in words."""
        if self.accumulation == 1:
            return f"{self.ms:.0f} ms a step"
        each = self.ms / self.accumulation
        return f"{self.ms:.0f} ms a step of {self.accumulation} micro-batches ({each:.0f} ms each)"

    @property
    def name(self) -> str:
        """In a few words."""
        get = self.settings.get
        blocks = get("train.gradient_checkpointing", True)
        words = [str(get("train.layout", ""))]
        words.append(
            "no checkpointing"
            if blocks is False
            else "checkpointed"
            if blocks is True
            else "partly checkpointed"
        )
        if get("train.fused_step"):
            words.append("fused step")
        offloaded = [
            part for part in ("optimizer", "weights", "activations") if get(f"offload.{part}") == "cpu"
        ]
        if offloaded:
            words.append(f"{' and '.join(offloaded)} in system RAM")
        words += self.changes
        return ", ".join(word for word in words if word)
