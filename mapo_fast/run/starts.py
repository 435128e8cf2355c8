"""`settings.json` of a run's folder: its settings at each start, and where each one came from.

A resume may change settings that do not affect the updates; earlier settings stay in the file. Nothing
depends on this file: a resume is compared with `run.json`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mapo_fast import __version__
from mapo_fast.run.folder import read_run
from mapo_fast.settings.schema import Config
from mapo_fast.settings.view import as_json, known
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.files import disk_errors, read_json
from mapo_fast.util.records import WrongFileError, unsealed, write_record

SETTINGS = "settings.json"


class Start(BaseModel):
    """The settings from a step on."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: int
    """The step that these settings start from."""
    version: str
    processes: int
    settings: dict[str, dict[str, Any]]
    """Settings in the form that `mapo-fast show --json` prints."""


class Starts(BaseModel):
    """Contents of the file, without its checksum."""

    model_config = ConfigDict(strict=True, frozen=True)

    run: str
    """Id of the run."""
    starts: list[Start] = []


def keep_settings(config: Config, run: str, *, step: int, processes: int) -> list[str]:
    """Add the settings of a start, unless they equal the previous ones; the caller holds the folder.

    Returns:
        Lines to show: empty, or that the file cannot be read and has been moved aside.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    path = config.train.output / SETTINGS
    before, notes = _read(path, run)
    start = Start(step=step, version=__version__, processes=processes, settings=as_json(known(config)))
    if not before.starts or before.starts[-1] != start.model_copy(update={"step": before.starts[-1].step}):
        now = Starts(run=run, starts=[*before.starts, start])
        write_record(path, now.model_dump())
    return notes


def last_settings(output: Path) -> dict[str, dict[str, Any]]:
    """The settings of a run's last start, each with its value and where it comes from.

    Raises:
        UserError: there is no run, or its `settings.json` is missing or damaged.
    """
    if (record := read_run(output)) is None:
        raise UserError(f"{output} holds no run: name its settings, with a config file or --preset")
    found, notes = _read(output / SETTINGS, record.run, aside=False)
    if not found.starts:
        why = "; ".join(notes) or f"{output / SETTINGS} is missing"
        raise UserError(f"{why}: repeat the run's command with --resume")
    return found.starts[-1].settings


def _read(path: Path, run: str, *, aside: bool = True) -> tuple[Starts, list[str]]:
    none = Starts(run=run)
    if not os.path.lexists(path):
        return none, []
    try:
        found = Starts.model_validate(unsealed(read_json(path)))
        if found.run == run:
            return found, []
        problem = f"{path} is another run's"
    except MachineError:
        raise
    except UserError as error:
        problem = str(error)
    except (WrongFileError, ValidationError):
        problem = f"{path} is damaged"
    if not aside:
        return none, [problem]
    other = path.with_name(f"unreadable-{path.name}")
    with disk_errors(path):
        path.replace(other)
    return none, [f"{problem}: it is now {other.name}, and a new {path.name} is begun"]
