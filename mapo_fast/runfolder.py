"""The output folder of a run: claimed once, continued only by the same run.

`run.json` holds the settings and the identity of the data and the start model. A folder that already holds a
run is never written to without `--resume`, and a resume with settings that would change the arithmetic is
refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapo_fast import __version__
from mapo_fast.config import Config
from mapo_fast.errors import UserError
from mapo_fast.files import disk_errors, write_json


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    output: Path
    step: int
    finished: bool
    """False when a signal stopped it early; the checkpoint to resume from is written."""
    skipped_steps: int
    """Steps that were not finite and changed nothing."""


_MAY_CHANGE = frozenset(
    {
        "objective.reference",
        "speed.compile",
        "speed.cuda_graph",
        "speed.fused_ops",
        "speed.prefetch",
        "train.output",
        "train.steps",
        "train.device",
        "train.threads",
        "train.vram",
        "train.layout",
        "train.shard",
        "train.gradient_checkpointing",
        "train.attention",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.evaluate_every",
        "train.max_skipped_steps",
        "train.wandb",
    }
)
"""Settings a resume may change: they leave the sequence of updates as it is, up to rounding.

speed.channels_last is not among them: 8-bit states belong to a weight's elements by their order in memory."""

_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
"""Learning-rate schedules that do not depend on the number of steps; with the others it is fixed."""

_SECTIONS_MAY_CHANGE = ("data", "model", "offload", "preview")
"""Data and start model are compared by content instead, so that folders may move."""


def check_output(config: Config, identity: dict[str, str], *, resume: bool, processes: int = 1) -> None:
    """Refuse an output folder that is not this run's; nothing is written.

    Args:
        config: this run's settings.
        identity: fingerprints of the cache, the start model and its noise schedule.
        resume: whether to continue; resuming a folder that holds nothing starts there.
        processes: of this run. A resume may have another number of them if it has as many micro-batches a
            step: they are the same ones then.

    Raises:
        UserError: another run is there, or the resumed run had other settings, data or start model.
    """
    output = config.train.output
    path = output / "run.json"
    with disk_errors(output):
        found = path.exists()
    if found:
        if not resume:
            raise UserError(
                f"{output} already holds a run: add --resume to continue it, or set another train.output"
            )
        _check_same_run(path, _record(config, identity, processes))
    elif output.exists() and (not output.is_dir() or any(not _leftover(file) for file in output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: set another train.output")


def _leftover(file: Path) -> bool:
    """Whether it is a `run.json` that a killed process was about to write."""
    return file.name.startswith(".run.json.") and file.name.endswith(".tmp")


def recorded_settings(output: Path) -> dict[str, Any] | None:
    """The settings of the run in this folder, by section; None where there is none or it cannot be read."""
    try:
        return dict(json.loads((output / "run.json").read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_results(output: Path) -> None:
    """Refuse to start over where a run has ended and its checkpoints are gone.

    Raises:
        UserError: a result is there.
    """
    for name in ("unet", "lora"):
        if (output / name).exists():
            raise UserError(
                f"cannot resume {output}: it holds the result {name}/ but no checkpoint "
                "(set another train.output)"
            )


def claim_output(config: Config, identity: dict[str, str], processes: int = 1) -> None:
    """Create the output folder with its `run.json`, unless it is there already."""
    output = config.train.output
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if not (output / "run.json").exists():
        write_json(output / "run.json", _record(config, identity, processes))


def _record(config: Config, identity: dict[str, str], processes: int) -> dict[str, Any]:
    return {
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "identity": identity,
        "processes": processes,
    }


def _check_same_run(path: Path, record: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        old, old_identity = _arithmetic(before["config"]), dict(before["identity"])
        per_step = old["train.accumulation"] * before.get("processes", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): start again with another train.output") from None
    new = _arithmetic(record["config"])
    processes = record["processes"]
    now = new.pop("train.accumulation") * processes
    if now != per_step:
        way_out = (
            f"set train.accumulation = {per_step // processes}"
            if per_step % processes == 0
            else f"the number of processes must divide {per_step}"
        )
        raise UserError(
            f"cannot resume {path.parent}: a step had {per_step} micro-batches, train.accumulation = "
            f"{now // processes} in {processes} process(es) makes it {now} ({way_out})"
        )
    del old["train.accumulation"]
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            raise UserError(
                f"cannot resume {path.parent}: {name} was {old.get(name)!r} and is now {new.get(name)!r} "
                "(set it back, or start with another train.output)"
            )
    for name, value in record["identity"].items():
        if old_identity.get(name) != value:
            raise UserError(f"cannot resume {path.parent}: the {name} is not the one this run started with")


def _arithmetic(config: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value of every setting that the updates depend on."""
    endless = config["optim"]["schedule"] in _SCHEDULES_WITHOUT_END
    free = _MAY_CHANGE if endless else _MAY_CHANGE - {"train.steps"}
    return {
        f"{section}.{key}": value
        for section, part in config.items()
        if section not in _SECTIONS_MAY_CHANGE
        for key, value in part.items()
        if f"{section}.{key}" not in free
    }
