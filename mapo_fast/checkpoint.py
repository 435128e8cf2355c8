"""Checkpoints that are either whole or absent, and the final UNet folder.

    <folder>/step-00000100/model.safetensors       one file per name given to `save`
                           optimizer.safetensors
                           state.json              JSON state, and the SHA-256 of itself and of each file

A checkpoint is written into `.step-00000100.tmp`; every file and folder is fsynced; then one rename makes it
visible and the oldest ones are pruned (renamed away before they are deleted). A process killed at any moment
therefore leaves whole checkpoints and at most a temporary folder, which the next save removes. Only
safetensors and JSON are read: nothing is unpickled.

A whole checkpoint of the same step is left as it is (one run has one state per step); a damaged one is
replaced. Pruning never removes a checkpoint of a later step than the one just saved.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mapo_fast.errors import UserError
from mapo_fast.files import disk_errors, fsync, sha256_file
from mapo_fast.tensorfile import write_tensors
from mapo_fast.tensorparts import fill

_FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that were passed over, with the reason."""

    def copy_into(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors saved under `name` straight into existing ones: no second copy of the model.

        Raises:
            UserError: other names or shapes than the checkpoint's; nothing was copied then.
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

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep` is how many checkpoints stay after a save."""
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint must be kept")
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, then prune.

        Args:
            step: optimizer steps done.
            tensors: file name -> tensor name -> tensor, on any device; written one by one, no copy of all.
            state: anything JSON holds exactly (floats round-trip; tuples come back as lists).

        Raises:
            UserError: disk full or not writable; the older checkpoints are intact.
        """
        target = self.folder / f"step-{step:08d}"
        text = json.dumps(dict(state))
        with disk_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.iterdir():
                if _TEMPORARY.fullmatch(leftover.name):
                    shutil.rmtree(leftover)
            if target.exists():
                if _problem(target) is None:
                    return target
                _remove(target)
            with new_folder(target) as temporary:
                hashes = {}
                for name, group in tensors.items():
                    hashes[f"{name}.safetensors"] = write_tensors(temporary / f"{name}.safetensors", group)
                record = {
                    "format": _FORMAT,
                    "step": step,
                    "sha256": {**hashes, "state": hashlib.sha256(text.encode()).hexdigest()},
                    "state": text,
                }
                (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            older = [path for found, path in self._found() if found <= step]
            for path in older[: -self.keep]:
                _remove(path)
        return target

    def discard_from(self, step: int) -> int | None:
        """Delete the checkpoints of `step` and later, unless no earlier one would be left.

        Returns:
            Step of the newest checkpoint that stays; None when there is none at all.
        """
        found = self._found()
        earlier = [kept for kept, _ in found if kept < step]
        if earlier:
            with disk_errors(self.folder):
                for later, path in found:
                    if later >= step:
                        _remove(path)
            return earlier[-1]
        return found[-1][0] if found else None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose hashes are right; None when there is none at all.

        `Checkpoint.damaged` lists the newer ones that were passed over.

        Raises:
            UserError: there are checkpoints, all damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for step, path in reversed(self._found()):
            problem = _problem(path)
            if problem is None:
                record = json.loads((path / "state.json").read_text(encoding="utf-8"))
                return Checkpoint(path, step, json.loads(record["state"]), tuple(damaged))
            damaged.append((path, problem))
        if damaged:
            listed = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({listed}); start a new run in another "
                "train.output folder"
            )
        return None

    def _found(self) -> list[tuple[int, Path]]:
        """All visible checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = ((_STEP.fullmatch(path.name), path) for path in self.folder.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in matches if match)


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


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `target`; on success fsync all of it and rename it to `target`.

    A folder that stands at `target` is moved aside just before and deleted just after. On any error the
    temporary folder is removed and `target` stays.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    aside = target.with_name(f".{target.name}.old")
    for leftover in (temporary, aside):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            fsync(path)
        fsync(temporary)
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Hide, then delete: a kill in between must not leave half a checkpoint visible."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            return f"format {record['format']} is not one this version reads"
        hashes = dict(record["sha256"])
        if hashlib.sha256(record["state"].encode()).hexdigest() != hashes.pop("state"):
            return "state.json does not match its checksum"
        for name, expected in hashes.items():
            if sha256_file(path / name) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json is not readable"
    return None
