"""`mapo-fast export`: a run's result, or a model, as the file or folder that another program wants.

Nothing is trained and nothing is loaded whole: tensors are read, rounded and written one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from mapo_fast.models.open import open_model, open_sdxl
from mapo_fast.models.parts import folder_part
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.save import save_folder, save_single_file
from mapo_fast.models.single_file import metadata
from mapo_fast.models.stored import Loaded, whole
from mapo_fast.run.export import DTYPES, metadata_of
from mapo_fast.run.folder import RECORD, read_run
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.progress import Callbacks
from mapo_fast.util.tensorheader import read_header

Form = Literal["single-file", "diffusers"]
FORMS: tuple[Form, ...] = ("single-file", "diffusers")


class _Source(NamedTuple):
    """What is exported."""

    model: Pipeline
    unet: Mapping[str, Tensor] | None
    """Trained weights in place of the model's."""
    metadata: dict[str, str] | None


def convert(
    source: Path,
    to: str,
    out: Path,
    *,
    base: Path | None = None,
    dtype: str = "auto",
    step: int | None = None,
    force: bool = False,
    with_metadata: bool = True,
    callbacks: Callbacks | None = None,
) -> None:
    """Write a run's result or a model in another form.

    Args:
        source: a run's folder, finished or not, or a model: a pipeline folder or a single file.
        to: one of `FORMS`.
        out: the file or folder to write.
        base: the start model, where it is no longer where the run found it; of a single file, the model that
            has the parts it lacks.
        dtype: of the weights, a key of `export.DTYPES`; `auto` keeps that of a single file and takes fp16 for
            a folder's in a single file.
        step: of a run, the checkpoint to take in place of the result, or of the newest checkpoint.
        force: replace what stands at `out`.
        with_metadata: whether a single file says what it is.
        callbacks: are told what is written.

    Raises:
        UserError: the source is none of these or damaged, the target exists or would replace the source, a
            value is beyond fp16's range.
        MachineError: the disk is full or cannot be written.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    _check_target(source, to, out, force)
    found = _run(source, base, step) if (source / RECORD).is_file() else _model(source, base, step)
    callbacks = callbacks or Callbacks()
    wanted = DTYPES[dtype]
    if to == "diffusers":
        save_folder(found.model, out, dtype=wanted, unet=found.unet)
    else:
        known = found.metadata if with_metadata else None
        save_single_file(found.model, out, dtype=wanted, unet=found.unet, metadata=known)
    callbacks.message(f"wrote {out}")


def _model(source: Path, base: Path | None, step: int | None) -> _Source:
    if step is not None:
        raise UserError(f"--step {step}: {source} is no run; leave it out")
    model = open_sdxl(source, base=base)
    return _Source(model, None, metadata(model))


def _run(source: Path, base: Path | None, step: int | None) -> _Source:
    record = read_run(source)
    assert record is not None
    config = _config(source, record.config)
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    if config.adapter.kind == "lora":
        raise UserError(f"{source} trained a LoRA, not a whole model: its files are in {source / 'lora'}")
    try:
        model = open_model(config)
    except UserError as error:
        raise UserError(f"{error}; --base names the start model, if it has moved") from None
    trained = _trained(source, record.run, step)
    expected = model.parts["unet"].shapes()
    if {name: tuple(stored.shape) for name, stored in trained.stored.items()} != expected:
        raise UserError(
            f"{source} does not hold a UNet like that of {model.path}: --base names another model"
        )
    return _Source(model, trained, metadata_of(config, model))


def _config(source: Path, recorded: dict[str, dict[str, object]]) -> Config:
    """The settings of a run, for what an export needs of them."""
    sections = {
        name: recorded.get(name, {}) for name in ("model", "data", "train", "objective", "adapter", "export")
    }
    return parse_config(sections, where=str(source / RECORD))


def _trained(source: Path, run: str, step: int | None) -> Loaded:
    """The UNet of a run's result, or of a checkpoint.

    Raises:
        UserError: there is none, or not of that step.
    """
    if step is None and (source / "unet").is_dir():
        return Loaded(folder_part("unet", source / "unet").stored)
    store = CheckpointStore(source / "checkpoints", 1, run)
    checkpoint = store.newest() if step is None else store.at(step)
    if checkpoint is None:
        raise UserError(f"{source} has no result and no checkpoint yet: train it first")
    header = read_header(checkpoint.path / "model.safetensors")
    return Loaded({name: whole(header.path, entry) for name, entry in header.tensors.items()})


def _check_target(source: Path, to: str, out: Path, force: bool) -> None:
    """Raise `UserError` where the target must not be written."""
    if to == "single-file" and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a single file's name ends in .safetensors")
    if not source.exists():
        raise UserError(f"{source} not found: name a run's folder, a pipeline folder or a .safetensors file")
    if not out.exists():
        return
    real, inside = out.resolve(), source.resolve()
    if real == inside or inside.is_relative_to(real):
        what = "is the source itself" if real == inside else "holds the source"
        if out.is_dir() or not force:
            raise UserError(f"--out {out} {what}: write elsewhere")
    if not force:
        raise UserError(f"--out {out} exists: name another, or replace it with --force")
    if out.is_dir() != (to == "diffusers"):
        raise UserError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}: name another")
    if out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise UserError(f"--out {out} is a folder with something else in it than a pipeline: name another")
