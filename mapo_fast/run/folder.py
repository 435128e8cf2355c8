"""The output folder of a run: claimed once, continued only by the same run.

`run.json` holds the run's id, its settings and the identity of the data and the start model. A folder that
already holds a run is never written to without `--resume`, and a resume with settings that would change the
arithmetic is rejected with a message that names them.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from mapo_fast import __version__
from mapo_fast.settings.optimizers import REMOVED
from mapo_fast.settings.places import free_output
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import TABLE, affecting
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.files import disk_errors, read_json
from mapo_fast.util.folders import delete, remove_halves
from mapo_fast.util.records import WrongFileError, unsealed, write_record


@dataclass(frozen=True)
class FitResult:
    """Where a run ended."""

    output: Path
    step: int
    finished: bool
    """False when a signal, such as Ctrl-C, stopped the run: `fit(config, resume=True)` continues it."""
    skipped_steps: int
    """Steps that were not finite and so changed nothing."""
    saved_step: int | None = field(default=None, compare=False)
    """Step of the checkpoint to resume from; None before the first step."""
    signal: int = field(default=0, compare=False)
    """Number of the signal that stopped the run; 0 without one."""
    best_step: int | None = field(default=None, compare=False)
    """The best step by the held-out pairs (`train.best`), in `best/`; None where there is none."""
    model: Path | None = field(default=None, compare=False)
    """Folder of the result, for `UNet2DConditionModel.from_pretrained` or, with a LoRA,
    `pipe.load_lora_weights`; None before the end."""

    @property
    def log(self) -> Path:
        """The log file: all figures, one JSON object per line."""
        return self.output / "log.jsonl"


class RunRecord(BaseModel):
    """Contents of a `run.json`, without its checksum."""

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal[2] = 2
    run: str
    """Id of the run, which its other files name; empty in files of format 1, which had no id."""
    version: str
    config: dict[str, dict[str, Any]]
    identity: dict[str, str]
    """Fingerprints of the cache, the start model and its noise schedule."""
    processes: int = Field(1, ge=1)


RECORD = "run.json"
START = "held_out_start.safetensors"
RESULTS = ("unet", "lora")
AVERAGE = "ema"
"""Folder of a run that holds the averaged weights."""

_LEFTOVER = re.compile(r"\.(.+\.\d+\.tmp|tmp\w{6})")
"""Names of temporary files of `files.atomic_path`, and of safetensors, which older versions used."""

_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
"""Learning-rate schedules that do not depend on `train.steps`; with others a resume cannot change it."""


def check_output(config: Config, identity: dict[str, str], *, resume: bool, processes: int = 1) -> None:
    """Raise where an output folder is not this run's; nothing is written.

    Args:
        config: this run's settings.
        identity: fingerprints of the cache, the start model and its noise schedule.
        resume: whether to continue; resuming an empty folder starts a run there.
        processes: number of processes. A resume may change it if a step keeps its number of micro-batches,
            which are then the same ones.

    Raises:
        UserError: another run is there, or the resumed run had other settings, data or start model.
    """
    output = config.train.output
    if (before := read_run(output)) is not None:
        if not resume:
            raise UserError(
                f"{output} already holds a run: add --resume to continue it, or take another folder: "
                f"--out {free_output(output)} (train.output)"
            )
        _check_same_run(output, before, _record(config, identity, processes))
        return
    with disk_errors(output):
        if output.exists() and (not output.is_dir() or any(not _ours(file) for file in output.iterdir())):
            raise UserError(f"{output} exists and is not an empty folder: set another train.output")


def check_stated(config: Config, before: RunRecord) -> None:
    """Refuse to continue a run with other settings than it has; what the config leaves open is no such one.

    Raises:
        UserError: naming the setting.
    """
    now = _arithmetic(config.model_dump(mode="json"))
    try:
        had = _arithmetic(before.config)
    except (KeyError, TypeError):
        return  # `check_output` says what is wrong with it
    for name in sorted(config.stated & now.keys() & had.keys() - {"train.accumulation"}):
        _check_value(config.train.output, name, had[name], now[name])


def _check_value(output: Path, name: str, had: Any, has: Any) -> None:
    if had != has:
        raise UserError(
            f"cannot resume {output}: {name} was {had!r} and is now {has!r} (set it back, or start with "
            "another train.output)"
        )


def _ours(file: Path) -> bool:
    """Whether the file may come from a process that was killed before it wrote `run.json`."""
    return file.name == ".lock" or (file.name.startswith(f".{RECORD}.") and file.name.endswith(".tmp"))


def read_run(output: Path) -> RunRecord | None:
    """The record of the run in a folder; None where there is none.

    Raises:
        UserError: the record cannot be read, or does not match its checksum.
    """
    path = output / RECORD
    with disk_errors(output):
        if not path.exists():
            return None
    try:
        stated = read_json(path)
        if "format" in stated:
            return RunRecord.model_validate(unsealed(stated))
        return RunRecord.model_validate({**stated, "run": ""})
    except MachineError:
        raise
    except UserError as error:
        problem = str(error)
    except WrongFileError as error:
        problem = f"{path} {error}"
    except ValidationError:
        problem = f"{path} cannot be read as the record of a run"
    raise UserError(f"{problem}: restore the file from a backup, or start again with another train.output")


def recorded_settings(output: Path) -> dict[str, Any] | None:
    """The settings of the run in this folder, by section; None where there is none or it cannot be read."""
    try:
        record = read_run(output)
    except UserError:
        return None
    return None if record is None else record.config


def check_results(output: Path) -> None:
    """Raise where a run has ended and its checkpoints are gone, instead of starting over.

    Raises:
        UserError: the folder holds a result.
    """
    for name in RESULTS:
        if (output / name).exists():
            raise UserError(
                f"cannot resume {output}: it holds the result {name}/ but no checkpoint "
                "(set another train.output)"
            )


def claim_output(config: Config, identity: dict[str, str], processes: int = 1) -> str:
    """Write `run.json` unless it exists; the caller has made the folder and holds it.

    Returns:
        The run's id.
    """
    output = config.train.output
    if (found := read_run(output)) is not None:
        return found.run
    record = _record(config, identity, processes)
    write_record(output / RECORD, record.model_dump())
    return record.run


def remove_leftovers(output: Path) -> None:
    """Remove temporary files and half-written results of killed processes; the caller holds the folder."""
    with disk_errors(output):
        for name in RESULTS:
            remove_halves(output / name)
        for folder in (output, output / "reference", output / "scheduler"):
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(path.name):
                    delete(path)


def _record(config: Config, identity: dict[str, str], processes: int) -> RunRecord:
    return RunRecord(
        run=uuid.uuid4().hex,
        version=__version__,
        config=config.model_dump(mode="json"),
        identity=identity,
        processes=processes,
    )


def _check_same_run(output: Path, before: RunRecord, now: RunRecord) -> None:
    new, processes = _arithmetic(now.config), now.processes
    try:
        old = _arithmetic(before.config)
        per_step = int(old.pop("train.accumulation")) * before.processes
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{output / RECORD} cannot be read as the record of a run: start again with another train.output"
        ) from None
    if (why := REMOVED.get(str(old.get("optim.name")))) is not None:
        raise UserError(f"cannot resume {output}: optim.name was {old['optim.name']!r}, and {why}")
    micro_batches = new.pop("train.accumulation") * processes
    if micro_batches != per_step:
        way_out = (
            f"set train.accumulation = {per_step // processes}"
            if per_step % processes == 0
            else f"the number of processes must divide {per_step}"
        )
        raise UserError(
            f"cannot resume {output}: a step had {per_step} micro-batches, train.accumulation = "
            f"{micro_batches // processes} in {processes} process(es) makes it {micro_batches} ({way_out})"
        )
    for name in sorted(new.keys() | old.keys()):
        _check_value(output, name, old.get(name), new.get(name))
    for name, value in now.identity.items():
        if before.identity.get(name) != value:
            raise UserError(f"cannot resume {output}: the {name} is not the one this run started with")


def _arithmetic(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`section.key` → value of all settings that the updates depend on, and of unknown ones.

    A setting that is newer than the record has its default, which is what the run was made with. Data and
    start model are compared by content instead, so that folders may move.

    Raises:
        KeyError: settings that every version had are missing.
    """
    found = {f"{section}.{key}": value for section, part in config.items() for key, value in part.items()}
    free = {row.name for row in TABLE} - {row.name for row in affecting("arithmetic")}
    if found["optim.schedule"] not in _SCHEDULES_WITHOUT_END:
        free -= {"train.steps"}
    values = {row.name: to_jsonable_python(row.default) for row in TABLE} | found
    return {name: value for name, value in values.items() if name not in free}
