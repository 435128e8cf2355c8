"""The settings that an image is sampled with, besides its model, prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mapo_fast.models.conditioning import UNCONDITIONAL
from mapo_fast.models.schedulers import SAMPLERS, SCHEDULES
from mapo_fast.models.sdxl import LATENT
from mapo_fast.util.errors import UserError, shown

LARGEST_SIDE = 4096
LONGEST_TEXT = 10_000
"""Most characters of a prompt; a longer one is a mistake."""


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; the defaults are those of previews."""

    steps: int = 25
    cfg: float = 5.0
    rescale: float = 0.0
    width: int = 1024
    height: int = 1024
    sampler: str = "euler"
    schedule: str = "normal"
    negative: str = ""
    unconditional: str | None = None
    """For an empty negative prompt; None is what the model's own config says."""
    spacing: str | None = None
    """diffusers' `timestep_spacing`; None is the model's. Presets and pictures set it, no option does."""


PRESETS: dict[str, dict[str, Any]] = {
    "comfyui": {
        "steps": 20,
        "cfg": 8.0,
        "sampler": "euler",
        "schedule": "normal",
        "unconditional": "empty",
        "spacing": "linspace",
    }
}
"""`comfyui` has the defaults of ComfyUI's node KSampler, whose schedules begin at full noise."""


def wrong(name: str, value: Any) -> str | None:
    """Requirement of a setting of `Sampling` that a value does not meet; None where it does."""
    if name in _RANGES:
        low, high, kind = _RANGES[name]
        number = isinstance(value, kind) and not isinstance(value, bool)
        return None if number and low <= value <= high else f"must be {low} to {high}"
    if name in ("width", "height"):
        fits = type(value) is int and LATENT <= value <= LARGEST_SIDE and value % LATENT == 0
        return None if fits else f"must be a multiple of {LATENT}, at most {LARGEST_SIDE}"
    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"must be one of {', '.join(_CHOICES[name])}"
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        return f"must have at most {LONGEST_TEXT:,} characters"
    return None if value.isascii() or _encodes(value) else "must be valid Unicode"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_RANGES: dict[str, tuple[int, int, Any]] = {
    "steps": (1, 1000, int),
    "cfg": (0, 100, int | float),
    "rescale": (0, 1, int | float),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": tuple(SAMPLERS),
    "schedule": SCHEDULES,
    "unconditional": UNCONDITIONAL,
    "spacing": ("linspace",),
}


def sampling(preset: str | None, like: Mapping[str, Any], stated: Mapping[str, Any]) -> Sampling:
    """The settings of a preset, replaced by those of a picture, and then by explicit ones.

    Args:
        preset: a key of `PRESETS`, or None.
        like: settings out of a picture, checked.
        stated: options by name of the setting.

    Raises:
        UserError: an unknown preset, or a stated value that is out of range; the message names the option.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset}: one of {', '.join(PRESETS)}")
    for name, value in stated.items():
        if (expected := wrong(name, value)) is not None:
            option = "size" if name in ("width", "height") else name
            raise UserError(f"--{option} {shown(value)}: {name} {expected}")
    return Sampling(**{**PRESETS.get(preset or "", {}), **like, **stated})
