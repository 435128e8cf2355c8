"""Convert a run that an older version began, once, so that its files name their run and step.

Format 1 had `run.json` without an id or a checksum, `state.json` with a checksum of the state only, the start
model's held-out errors without a checksum, and reference errors without their positions. Everything that can
be checked is checked; then each file is written again in this version's format, `run.json` last. A kill in
between does no harm, because the id is a hash of the old `run.json`. After that nothing of format 1 is read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mapo_fast.engine import reference
from mapo_fast.models.identity import files_fingerprint, unet_identity
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.evaluate import start_of
from mapo_fast.run.folder import RECORD, START, read_run
from mapo_fast.run.precompute import depends_on
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import CheckpointStore, Record
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import parse_json, read_json, sha256_file
from mapo_fast.util.records import WrongFileError, write_record
from mapo_fast.util.sealed import open_tensors, write_sealed


def adopt(config: Config, identity: dict[str, str], store: CheckpointStore) -> list[str]:
    """Take over the run in `train.output`, which is held, if it is one of format 1.

    Args:
        config: the run's settings, which match the record.
        identity: fingerprints of the cache, the start model and its noise schedule.
        store: the run's checkpoints.

    Returns:
        Lines to show; empty if there is no such run.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    output = config.train.output
    record = read_run(output)
    if record is None or record.run:
        return []
    run = sha256_file(output / RECORD)[:32]
    for _, path in store.found():
        _adopt_checkpoint(path / "state.json", run)
    _adopt_start(output / START, run)
    _adopt_parts(output / "reference", depends_on(config, identity), run)
    write_record(output / RECORD, record.model_copy(update={"run": run}).model_dump())
    notes = [
        f"mapo_fast {record.version} began this run, and its files do not say which run and step they "
        "belong to: they were taken over as they are, this once, and say it now"
    ]
    if config.train.precision == "pure_bf16" and config.train.accumulation > 1:
        notes.append(
            "from here on the run adds the gradients of micro-batches with stochastic rounding, no longer "
            "to nearest: its weights differ from those that the older version would have made"
        )
    return notes


def start_identity(output: Path, model: Pipeline) -> str:
    """The identity of the start model, in the form that the run in a folder has recorded.

    Earlier versions identified a model by its files, with their names and their configs' whole text.
    """
    try:
        record = read_run(output)
    except UserError:  # reported where the folder is checked
        record = None
    known = None if record is None else record.identity.get("start model")
    return known if known and known == files_fingerprint(model, ("unet",)) else unet_identity(model)


def _adopt_checkpoint(path: Path, run: str) -> None:
    try:
        old = read_json(path)
        text, hashes = old["state"], dict(old["sha256"])
        right = hashes.pop("state") == hashlib.sha256(text.encode()).hexdigest()
        if old["format"] != 1 or not right or not hashes:
            return
        record = Record(run=run, step=old["step"], files=hashes, state=parse_json(text))
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return  # it stays as it is, and is later found unusable
    write_record(path, record.model_dump())


def _adopt_start(path: Path, run: str) -> None:
    try:
        metadata, tensors = open_tensors(path)
    except WrongFileError:
        return
    if not metadata:
        write_sealed(path, start_of(run), tensors)


def _adopt_parts(folder: Path, depends: dict[str, Any], run: str) -> None:
    identity = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    for path in folder.glob("errors-*.safetensors"):
        try:
            metadata, tensors = open_tensors(path)
            first = reference.PART * int(path.stem.removeprefix("errors-"))
            errors = tensors["errors"]
        except (WrongFileError, KeyError, ValueError):
            continue
        digest = hashlib.sha256(errors.numpy().tobytes()).hexdigest()
        same = metadata == {"identity": identity, "sha256": digest}
        if same and path == reference.part_path(folder, first):
            write_sealed(path, reference.part_of({"run": run, **depends}, first), {"errors": errors})
