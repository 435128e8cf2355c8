"""Reading a config file: TOML, `section.key=value` overrides, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mapo_fast.settings.declare import Source
from mapo_fast.settings.given import as_json, user_path
from mapo_fast.settings.loras import parse_lora
from mapo_fast.settings.mistakes import mistakes
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import paths, value_of
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import os_error, read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_CONFIG_BYTES = 2**20


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply overrides, validate.

    Args:
        path: of the file. Relative paths in it are relative to its folder.
        overrides: settings to replace, as `section.key=value`; their paths are relative to the working
            folder.

    Returns:
        The settings, which cannot be changed; `Config.sources` says where each one comes from.

    Raises:
        UserError: unreadable file, bad TOML, unknown key (with the nearest valid one), wrong type or range.
    """
    path = Path(path)
    try:
        table = _toml(read_bytes(path, _CONFIG_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}") from None
    except OSError as error:
        raise os_error(error, f"read config file {path}") from None
    except ValueError as error:
        raise UserError(f"config file {path} is not valid TOML: {error}") from None
    for name, section, key in _split(paths()):
        part = table.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = os.path.normpath(user_path(f"{path}: {name}", part[key], path.parent))
    part = table.get("model")
    if isinstance(part, dict) and isinstance(part.get("lora"), list):
        part["lora"] = _resolved_loras(f"{path}: model.lora", part["lora"], path.parent)
    for override in overrides:
        apply_override(table, override)
    config = parse_config(table, where=str(path))
    replaced = {override.partition("=")[0].strip() for override in overrides}
    return config.from_sources(
        {name: "command line" if name in replaced else "file" for name in config.stated}
    )


def _toml(text: str) -> dict[str, Any]:
    """`tomllib.loads` that fails in one way: `ValueError`, also for what is nested too deeply."""
    try:
        if _DEEP_KEY.search(text):  # tomllib takes minutes for keys of tens of thousands of parts
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_DEEP_KEY = re.compile(r"""(?:["'\w-]{1,64}\s?\.\s?){64}""")


def parse_config(table: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested dict of settings. Raises `UserError` as `load_config` does."""
    try:
        return Config.model_validate_json(as_json(table), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {mistakes(error, Config)}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None


def with_settings(config: Config, settings: dict[str, Any], source: Source = "stated") -> Config:
    """The config with some values (`section.key`) replaced, checked again; they are stated then.

    Args:
        settings: may be empty.
        source: where those come from that are not stated as they are.

    Raises:
        UserError: they cannot be combined.
    """
    table = json.loads(config.model_dump_json(exclude_unset=True))
    for name, value in settings.items():
        section, key = name.split(".")
        table.setdefault(section, {})[key] = value
    changed = parse_config(table, where="plan")
    stated = config.stated
    new = [n for n in settings if n not in stated or value_of(changed, n) != value_of(config, n)]
    return changed.from_sources({**config.sources, **dict.fromkeys(new, source)})


def _split(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Each name with its section and key."""
    return [(name, *name.split(".")) for name in names]  # type: ignore[misc]


def _resolved_loras(name: str, entries: list[Any], base: Path | None = None) -> list[Any]:
    """`model.lora` with its paths resolved; what is no text is left to the check of types."""
    return [str(parse_lora(name, text, base)) if isinstance(text, str) else text for text in entries]


def apply_override(table: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into a table of settings. Raises `UserError` where it is not written so."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise UserError(f"--set {override}: write it as section.key=value, for instance --set optim.lr=1e-5")
    value: Any = text.strip()  # a bare word is a string: --set objective.name=sft
    with suppress(ValueError):
        table_of_it = _toml(f"value = {text}")
        if len(table_of_it) == 1:  # more is text with line breaks in it
            value = table_of_it["value"]
    section = table.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise UserError(f"--set {override}: {keys[0]} is a value in the config file, not a section")
    if name.strip() == "model.lora" and isinstance(value, list):
        value = _resolved_loras(f"--set {name.strip()}", value)
    if name.strip() in paths() and isinstance(value, str):
        value = str(user_path(f"--set {name.strip()}", value))
    section[keys[1]] = value
