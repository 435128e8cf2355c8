"""Checkpoints that are either whole or absent, and the final UNet folder.

    <folder>/step-00000100/model.safetensors       one file per name given to `save`
                           optimizer.safetensors
                           state.json              run, step, JSON state; SHA-256 of itself and of each file
                           README.txt              how to use the checkpoint, for people; never read

A checkpoint is written into `.step-00000100.tmp`; every file and folder is fsynced; then one rename makes it
visible and the oldest ones are pruned (renamed away before they are deleted). A process killed at any moment
therefore leaves whole checkpoints, at most a temporary folder and one checkpoint too many, which the next
save or start removes. Only safetensors and JSON are read: nothing is unpickled.

A checkpoint that is damaged, renamed to another step or of another run is skipped. A whole checkpoint of the
same step is left as it is (a run has one state per step); an unusable one is replaced. Pruning never removes
a checkpoint of a later step than the one just saved, nor another run's. Where a checkpoint is a link to a
folder elsewhere, pruning removes the link and leaves that folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, os_error, read_json, sha256_file
from mapo_fast.util.folders import delete, new_folder
from mapo_fast.util.records import WrongFileError, unsealed, write_record
from mapo_fast.util.tensorfile import write_tensors
from mapo_fast.util.tensorparts import fill

FORMAT: Literal[2] = 2
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp")


class Record(BaseModel):
    """Contents of a `state.json`, without its checksum."""

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal[2] = FORMAT
    run: str
    """Id of the run."""
    step: int
    files: dict[str, str]
    """SHA-256 of each tensor file."""
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that cannot be used, with the reason."""

    def copy_into(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors saved under `name` straight into existing ones: no second copy of the model.

        Raises:
            UserError: names or shapes differ from the checkpoint's; nothing has been copied.
        """
        file = self._file(name)
        with safe_open(file, framework="pt") as handle:
            saved = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        wanted = {key: tuple(target.shape) for key, target in targets.items()}
        if saved != wanted:
            differing = sorted(
                key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key)
            )
            first = differing[0]
            raise UserError(
                f"{file} does not fit the model being trained: {first} is {saved.get(first, 'absent')} there "
                f"and {wanted.get(first, 'absent')} here ({len(differing)} tensors differ); resume with the "
                "model and adapter settings of the run"
            )
        for key, view in self.views(name):
            fill(targets[key], view)

    def views(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Names and memory-mapped tensors saved under `name`, one by one: copy them, do not keep them."""
        with safe_open(self._file(name), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                yield key, handle.get_tensor(key)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, run: str = "") -> None:
        """`keep` is how many checkpoints stay after a save, `run` the id of the run."""
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint must be kept")
        self.folder = folder
        self.keep = keep
        self.run = run

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        about: str = "",
    ) -> Path:
        """Write one checkpoint, then prune.

        Args:
            step: optimizer steps done.
            tensors: file name -> tensor name -> tensor, on any device; written one by one, no copy of all.
            state: anything JSON holds exactly (floats round-trip; tuples come back as lists).
            about: text of `README.txt`: how to use the checkpoint.

        Raises:
            UserError: disk full or not writable; the older checkpoints are intact.
        """
        target = self.folder / _name(step)
        with disk_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_halves()  # before anything is written: they may fill the disk
            if not self._is_whole(target, step):
                if os.path.lexists(target):
                    _remove(target)
                with new_folder(target) as temporary:
                    hashes = {}
                    for name, group in tensors.items():
                        file = f"{name}.safetensors"
                        hashes[file] = write_tensors(temporary / file, group)
                    record = Record(run=self.run, step=step, files=hashes, state=dict(state))
                    write_record(temporary / "state.json", record.model_dump())
                    (temporary / "README.txt").write_text(about, encoding="utf-8")
        self.tidy(step)
        return target

    def tidy(self, step: int) -> None:
        """Remove temporary folders of killed runs, and checkpoints up to `step` beyond those to keep.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with disk_errors(self.folder):
            self._remove_halves()
            kept = 0
            for found, path in reversed([known for known in self.found() if known[0] <= step]):
                try:
                    self._record(path, found)
                except _AnotherError:
                    continue
                except WrongFileError:
                    usable = 0
                else:
                    usable = 1
                if kept == self.keep:
                    _remove(path)
                kept = min(kept + usable, self.keep)

    def discard_from(self, step: int) -> int | None:
        """Delete the checkpoints of `step` and later, unless no usable one would be left.

        Returns:
            Step of the newest checkpoint that stays: `step` or later where there is no earlier one. None when
            there is none at all.
        """
        usable = [found for found, path in self.found() if self._is_whole(path, found)]
        earlier = [found for found in usable if found < step]
        if not earlier:
            return usable[-1] if usable else None
        with disk_errors(self.folder):
            for found in usable:
                if found >= step:
                    _remove(self.folder / _name(found))
        return earlier[-1]

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and this run's; None when there is none at all.

        `Checkpoint.passed_over` lists newer checkpoints that cannot be used.

        Raises:
            UserError: there are checkpoints, but none can be used.
        """
        passed_over: list[tuple[Path, str]] = []
        for step, path in reversed(self.found()):
            try:
                record = self._checked(path, step)
            except WrongFileError as error:
                passed_over.append((path, str(error)))
            else:
                return Checkpoint(path, step, record.state, tuple(passed_over))
        if passed_over:
            listed = "; ".join(f"{path.name}: {problem}" for path, problem in passed_over)
            raise UserError(
                f"no checkpoint in {self.folder} can be used ({listed}): put a good one back, or start a new "
                "run in another train.output folder"
            )
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            UserError: the checkpoint is missing or cannot be used.
        """
        found = self.found()
        for number, path in found:
            if number == step:
                try:
                    return Checkpoint(path, step, self._checked(path, step).state)
                except WrongFileError as error:
                    raise UserError(f"{path} cannot be used: {error}") from None
        steps = ", ".join(str(number) for number, _ in found) or "none"
        raise UserError(f"{self.folder} has no checkpoint of step {step}; those that are there: {steps}")

    def _remove_halves(self) -> None:
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                delete(path)

    def found(self) -> list[tuple[int, Path]]:
        """Everything with a checkpoint's name, oldest first.

        Raises:
            UserError: the folder cannot be listed. It may be a link to a missing disk, and a run must not
                start over then.
        """
        if not os.path.lexists(self.folder):
            return []
        try:
            matches = [(_STEP.fullmatch(path.name), path) for path in self.folder.iterdir()]
        except OSError as error:
            raise os_error(error, f"read {self.folder}") from None
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _is_whole(self, path: Path, step: int) -> bool:
        try:
            self._checked(path, step)
        except WrongFileError:
            return False
        return True

    def _checked(self, path: Path, step: int) -> Record:
        """The record of a checkpoint that may be used.

        Raises:
            WrongFileError: the checkpoint cannot be used; the text says why.
        """
        record = self._record(path, step)
        for name, expected in record.files.items():
            try:
                if sha256_file(path / name) != expected:
                    raise WrongFileError(f"{name} does not match its checksum")
            except FileNotFoundError:
                raise WrongFileError(f"{name} is missing") from None
            except OSError as error:
                raise WrongFileError(f"{name} cannot be read ({error.strerror})") from None
        return record

    def _record(self, path: Path, step: int) -> Record:
        """A checkpoint's record, checked to be of this run and step.

        Raises:
            WrongFileError: the record is of another run or step, or cannot be read.
        """
        try:
            is_folder = path.is_dir()
        except OSError as error:
            raise WrongFileError(f"it cannot be read ({error.strerror})") from None
        if not is_folder:
            raise WrongFileError("it is a link to nothing" if path.is_symlink() else "it is not a folder")
        file = path / "state.json"
        if not os.path.lexists(file):
            raise WrongFileError("state.json is missing")
        try:
            stated = read_json(file)
        except UserError:
            raise WrongFileError("state.json is not readable") from None
        version = stated.get("format")
        if isinstance(version, int) and version != FORMAT:
            raise WrongFileError(f"format {version} is not one this version reads")
        try:
            record = Record.model_validate(unsealed(stated))
        except WrongFileError as error:
            raise WrongFileError(f"state.json {error}") from None
        except ValidationError:
            raise WrongFileError("state.json is not readable") from None
        if record.run != self.run:
            raise _AnotherError("it belongs to another run")
        if record.step != step:
            raise WrongFileError(f"it is that of step {record.step}: name it {_name(record.step)} again")
        return record


class _AnotherError(WrongFileError):
    """A checkpoint of another run."""


def _name(step: int) -> str:
    return f"step-{step:08d}"


def save_unet(unet: Any, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a UNet as a plain diffusers folder for `UNet2DConditionModel.from_pretrained(folder)`.

    One `diffusion_pytorch_model.safetensors` in the weights' own dtypes, streamed tensor by tensor
    (diffusers' `save_pretrained` copies a shard of up to 10 GB). The folder appears whole and replaces an
    older one.

    Args:
        unet: a diffusers `UNet2DConditionModel`; its config is saved.
        folder: for instance `<train.output>/unet`.
        tensors: what to save instead of `unet.state_dict()` (for instance fp32 master weights); same names.

    Raises:
        UserError: disk full or not writable.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            unet.save_config(temporary)
            weights = unet.state_dict() if tensors is None else tensors
            write_tensors(temporary / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})


def _remove(checkpoint: Path) -> None:
    """Hide, then delete: a kill in between must not leave half a checkpoint visible."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.tmp")
    checkpoint.rename(hidden)
    delete(hidden)
