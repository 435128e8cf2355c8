"""LoRA files with weights, as the command line and `model.lora` write them: `FILE` or `FILE=WEIGHT`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from mapo_fast.settings.given import user_path
from mapo_fast.util.errors import UserError, shown


class Lora(NamedTuple):
    """A LoRA and how much of it is added."""

    path: Path
    weight: float

    def __str__(self) -> str:
        """The text that `parse_lora` reads."""
        return f"{self.path}={self.weight!r}"


def parse_lora(name: str, text: str, base: Path | None = None) -> Lora:
    """Read `FILE` or `FILE=WEIGHT`; a text that is an existing path is always a path.

    Args:
        name: name of the setting or option, for messages.
        text: the value to read.
        base: the folder that relative paths start from; the working folder by default.

    Raises:
        UserError: the weight is not a finite number, or no file can have the name.
    """
    path = user_path(name, text, base)
    file, equals, number = text.rpartition("=")
    if path.exists() or not equals:
        return Lora(path, 1.0)
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{name} = {shown(text)}: {number!r} is no weight; write FILE=0.8, or FILE alone")
    return Lora(user_path(name, file, base), weight)
