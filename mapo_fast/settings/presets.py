"""The recipes by name, for `--preset NAME`: configs that name no model, data and output.

Their files are those of `recipes/` at the top of the repository, which the wheel has in its package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapo_fast.settings.toml import parse_toml
from mapo_fast.util.errors import UserError

PRESETS = ("lora", "lora-small", "full", "dpo-lora", "kto-lora")
"""Names of the presets, in the order in which they are listed."""

_PACKAGE = Path(__file__).parents[1]
FOLDER = next(f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir())
"""Folder of the recipes: inside the package in a wheel, next to it in a checkout."""


def preset_text(name: str) -> str:
    """The file of a preset, with its comments.

    Raises:
        UserError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: there is no such preset; there are {', '.join(PRESETS)}")
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def preset_table(name: str) -> dict[str, Any]:
    """The settings of a preset, section by section; raises as `preset_text`."""
    return parse_toml(preset_text(name))
