"""Names a finished run's file, and says what to do with it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mapo_fast.run.folder import AVERAGE, FitResult
from mapo_fast.settings.places import result_name
from mapo_fast.settings.schema import Config
from mapo_fast.util.console import command_line
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, sha256_file


def check_folder(folder: Path) -> None:
    """Check that a result can be copied into a folder, before hours of training.

    Raises:
        UserError: it does not exist, is no folder or cannot be written to.
    """
    if not folder.is_dir():
        raise UserError(f"--copy-to {folder}: there is no such folder; make it, or name another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--copy-to {folder} cannot be written to: {error.strerror}") from None


def deliver(config: Config, result: FitResult, copy_to: Path | None) -> Iterator[str]:
    """Give the result's file its name, copy it where it is wanted, and say what each file is for.

    A LoRA's file is `MODEL-DATA-NUMBER.safetensors` in the run's folder, a full fine-tune's too where it was
    written as a single file. In `copy_to` nothing is overwritten: what is there already has another number.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    assert result.model is not None
    is_lora = config.adapter.kind == "lora"
    made = result.model / "lora_kohya.safetensors" if is_lora else result.output / "model.safetensors"
    data = config.data.source or config.data.cache
    name = result_name(config.model.path, data, result.output)
    folder, start = ("loras", ", start at strength 1.0") if is_lora else ("checkpoints", "")
    if made.is_file():
        file = result.output / f"{name}.safetensors"
        _put(made, file)
        if copy_to is None:
            yield f"ComfyUI, A1111: copy {file.resolve()} to models/{folder}{start}"
        else:
            yield f"ComfyUI, A1111: {_copied(file, copy_to).resolve()}{start}"
    path = str(result.model.resolve())
    if is_lora:
        yield f"diffusers: pipe.load_lora_weights({path!r})"
    else:
        yield f"diffusers: UNet2DConditionModel.from_pretrained({path!r})"
    if config.ema.half_life is not None:
        yield f"the average of the weights: {(result.output / AVERAGE / result.model.name).resolve()}"
    if result.best_step == result.step:
        yield f"the last step, {result.step}, is the best one by the held-out pairs"
    elif result.best_step is not None:
        words = ["mapo-fast", "export", str(result.output), "--best", "--to"]
        words += ["kohya" if is_lora else "single-file", "--out", f"{name}-best.safetensors"]
        yield f"step {result.best_step} is the best one by the held-out pairs: {command_line(words)}"


def _put(made: Path, file: Path) -> None:
    """Show the run's own file under another name, without its bytes twice where the file system can."""
    with disk_errors(file), atomic_path(file) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(made, temporary)
        except OSError:
            shutil.copyfile(made, temporary)


def _copied(file: Path, folder: Path) -> Path:
    """The copy of a file in a folder: the one that is there, or a new one under a name that is free."""
    stem, _, number = file.stem.rpartition("-")
    names = (folder / f"{stem}-{n}{file.suffix}" for n in range(int(number), 10**6))
    for path in names:
        with disk_errors(path):
            if not os.path.lexists(path):
                with atomic_path(path) as temporary:
                    shutil.copyfile(file, temporary)
                return path
            if path.is_file() and sha256_file(path) == sha256_file(file):
                return path
    raise UserError(f"--copy-to {folder}: no name is free for {file.name}")
