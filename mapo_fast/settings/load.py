"""Reading a config file: TOML, `section.key=value` overrides, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from mapo_fast.settings.declare import Source
from mapo_fast.settings.given import as_json, user_path
from mapo_fast.settings.loras import parse_lora
from mapo_fast.settings.mistakes import meant, mistakes
from mapo_fast.settings.places import default_places
from mapo_fast.settings.presets import preset_table
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import TABLE, paths, value_of
from mapo_fast.settings.toml import parse_toml
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import os_error, read_bytes

_CONFIG_BYTES = 2**20


def load_config(
    path: Path | str | None = None, overrides: Sequence[str] = (), *, preset: str | None = None
) -> Config:
    """Read a TOML file, a preset or both, apply overrides, validate.

    Args:
        path: the config file. Relative paths in it are relative to its folder.
        overrides: settings to replace, as `section.key=value`; their paths are relative to the working
            folder.
        preset: name of one of `presets.PRESETS`; settings of the file replace the preset's.

    Returns:
        The immutable settings; `Config.sources` says where each one comes from. Unless they are set, the run
        and its cache are under `runs` in the working folder (`places.py`).

    Raises:
        UserError: unknown preset, unreadable file, bad TOML, unknown key (with the nearest valid one), wrong
            type or range.
    """
    table: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for part, source in (
        ({} if preset is None else preset_table(preset), "preset"),
        ({} if path is None else _read(Path(path)), "file"),
    ):
        _make_way(table, _names(part))
        _put_over(table, part)
        sources |= dict.fromkeys(_names(part), cast(Source, source))
    _make_way(table, [override.partition("=")[0].strip() for override in overrides])
    for override in overrides:
        name = apply_override(table, override)
        sources[name] = "command line"
    for name, place in default_places(table).items():
        apply_override(table, f"{name}={json.dumps(place, ensure_ascii=False)}")
        sources[name] = "default"
    where = next((str(given) for given in (path, preset and f"--preset {preset}") if given), "command line")
    if path is None:
        _ask_for_names(table, where)
    config = parse_config(table, where=where)
    return config.from_sources({name: sources[name] for name in config.stated})


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file, with their paths from the working folder."""
    try:
        table = parse_toml(read_bytes(path, _CONFIG_BYTES).decode("utf-8-sig"))
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
    return table


def _put_over(table: dict[str, Any], part: dict[str, Any]) -> None:
    """Put the settings of a table over another one's, key by key."""
    for section, keys in part.items():
        if isinstance(keys, dict) and isinstance(table.get(section), dict):
            table[section] |= keys
        else:
            table[section] = keys


def _ask_for_names(table: dict[str, Any], where: str) -> None:
    """Ask for the model and the data, which only the command line can name if there is no file.

    Raises:
        UserError: the model or the data is not named.
    """
    names = _names(table)
    known = {row.name for row in TABLE}
    if any(name not in known and not name.startswith("objective.") for name in names):
        return  # reported first
    if "model.path" not in names:
        raise UserError(f"{where}: which model? Name it with --model FILE.safetensors")
    if "data.source" not in names and "data.cache" not in names:
        raise UserError(f"{where}: which data? Name the folder of your pairs with --data FOLDER")


def _make_way(table: dict[str, Any], names: Sequence[str]) -> None:
    """Remove the length of a run, in steps or epochs, where a later source sets it in the other unit."""
    length = {"train.steps", "train.epochs"}
    if len(length & {*names}) == 1 and isinstance(train := table.get("train"), dict):
        train.pop((length - {*names}).pop().partition(".")[2], None)


def _names(table: dict[str, Any]) -> list[str]:
    """`section.key` of all settings in a table."""
    sections = ((section, keys) for section, keys in table.items() if isinstance(keys, dict))
    return [f"{section}.{key}" for section, keys in sections for key in keys]


def expect_config(config: object) -> None:
    """Raise `TypeError` for anything but a `Config`, such as a file's path."""
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a Config, not {type(config).__name__}: load_config(path) reads a file"
        )


def parse_config(table: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested dict of settings; raises `UserError` for mistakes in it."""
    try:
        return Config.model_validate_json(as_json(table), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {mistakes(error, Config)}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None


def with_settings(config: Config, settings: dict[str, Any], source: Source = "stated") -> Config:
    """The config with some values (`section.key`) replaced and checked; these then count as set.

    Args:
        settings: new values by name; may be empty.
        source: source of the values that are new.

    Raises:
        UserError: the values cannot be combined.
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
    """`model.lora` with its paths resolved; entries that are not text are left to the check of types."""
    return [str(parse_lora(name, text, base)) if isinstance(text, str) else text for text in entries]


def apply_override(table: dict[str, Any], override: str) -> str:
    """Put one `section.key=value` into a table of settings; returns the name.

    Raises:
        UserError: the override is not written as `section.key=value`.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        hint = meant(keys[-1], Config) or "for instance --set objective.name=dpo"
        raise UserError(f"--set {override}: write it as section.key=value ({hint})")
    value: Any = text.strip()  # a bare word is a string: --set objective.name=sft
    with suppress(ValueError):
        table_of_it = parse_toml(f"value = {text}")
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
    return name.strip()
