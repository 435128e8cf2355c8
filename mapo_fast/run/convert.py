"""`mapo-fast export`: write a run's result, a LoRA or a model in the form that another program reads.

Nothing is trained and nothing is loaded whole: tensors are read, rounded and written one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mapo_fast.models.full_size import sdxl_parts
from mapo_fast.models.lora_file import LoraFile, is_lora, read_lora
from mapo_fast.models.lora_save import save_kohya, save_peft
from mapo_fast.models.merge import with_lora
from mapo_fast.models.open import open_model, open_sdxl
from mapo_fast.models.parts import Part, folder_part
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.save import save_folder, save_single_file
from mapo_fast.models.single_file import metadata, not_carried_over
from mapo_fast.models.stored import Loaded, whole
from mapo_fast.run.best import FOLDER as BEST
from mapo_fast.run.export import DTYPES
from mapo_fast.run.folder import AVERAGE, RECORD, read_run
from mapo_fast.run.metadata import lora_metadata_of, metadata_of
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import Checkpoint, CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.progress import Callbacks
from mapo_fast.util.tensorheader import read_header

FORMS = ("single-file", "diffusers", "kohya", "peft")
_OF_LORAS = ("kohya", "peft")
_HEAVIEST = 1e6
"""The largest weight of a LoRA; more is a typing error, and could overflow fp64."""


class _Source(NamedTuple):
    """A model to export."""

    model: Pipeline
    unet: Mapping[str, Tensor] | None
    """Trained weights in place of the model's."""
    metadata: dict[str, str] | None


class _Adapter(NamedTuple):
    """A LoRA to export, and its base where one is known."""

    lora: LoraFile
    parts: Mapping[str, Part]
    base: Pipeline | None


def convert(
    source: Path,
    to: str,
    out: Path,
    *,
    base: Path | None = None,
    tokenizers: Path | None = None,
    merge: float | None = None,
    dtype: str = "auto",
    step: int | None = None,
    which: str = "",
    force: bool = False,
    with_metadata: bool = True,
    callbacks: Callbacks | None = None,
) -> None:
    """Write a run's result, a LoRA or a model in another form.

    Args:
        source: a run's folder, finished or not; a LoRA's file or peft's folder; or a model: a pipeline folder
            or a single file.
        to: one of `FORMS`.
        out: the file or folder to write.
        base: the start model, if it has moved since the run; the model that a LoRA is merged into; for a
            single file, the model that has the parts it lacks.
        tokenizers: the folder with `tokenizer/` and `tokenizer_2/` that go into a pipeline folder, where a
            single file's are not CLIP's own.
        merge: add a LoRA at this weight to its base, and write the merged model.
        dtype: type of the weights, a key of `export.DTYPES`; `auto` keeps that of a single file and takes
            fp16 for a folder's in a single file. A LoRA's factors are written as they are.
        step: step of a run's checkpoint to export, instead of the result or the newest checkpoint.
        which: "best" exports a run's best step instead (`train.best`), "ema" the average of its weights.
        force: replace an existing file or folder at `out`.
        with_metadata: whether a file gets metadata that describe it.
        callbacks: called with a line that names the written file.

    Raises:
        UserError: the source is none of these or damaged, the target exists or would replace the source, a
            value is beyond fp16's range, base and LoRA are for different predictions.
        MachineError: the disk is full or cannot be written.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if tokenizers is not None and to != "diffusers":
        raise UserError(f"--tokenizers: --to {to} writes no tokenizers; leave it out")
    if which and step is not None:
        raise UserError(f"--step {step} and --{which} name two models: leave one out")
    _check_target(source, to, out, force)
    callbacks = callbacks or Callbacks()
    found = _open(source, base, tokenizers, step, which)
    if isinstance(found, _Adapter) and to in _OF_LORAS:
        _write_lora(found, to, out, dtype, merge, with_metadata)
    else:
        model = (
            _merged(found, to, merge) if isinstance(found, _Adapter) else _unmerged(found, source, to, merge)
        )
        if to == "diffusers":
            save_folder(model.model, out, dtype=DTYPES[dtype], unet=model.unet)
        else:
            known = model.metadata if with_metadata else None
            save_single_file(model.model, out, dtype=DTYPES[dtype], unet=model.unet, metadata=known)
        if note := not_carried_over(model.model, DTYPES[dtype]):
            callbacks.message(note)
    callbacks.message(f"wrote {out}")


def open_result(run: Path, which: str = "") -> Pipeline:
    """The start model of a run with the run's result in it, or with its newest checkpoint.

    Args:
        run: the run's folder.
        which: "best" takes its best step instead, "ema" the average of its weights.

    Raises:
        UserError: there is no result yet, or the start model is no longer where the run found it.
    """
    found = _run(run, None, None, None, which)
    if isinstance(found, _Adapter):
        assert found.base is not None
        return with_lora(found.base, found.lora, 1.0)
    assert isinstance(found.unet, Loaded)
    unet = replace(
        found.model.parts["unet"], where=run, stored=found.unet.stored, keys={}, header=None, added={}
    )
    return replace(found.model, parts={**found.model.parts, "unet": unet})


def _open(
    source: Path, base: Path | None, tokenizers: Path | None, step: int | None, which: str
) -> _Source | _Adapter:
    if (source / RECORD).is_file():
        return _run(source, base, tokenizers, step, which)
    if step is not None or which:
        option = f"--{which}" if which else f"--step {step}"
        raise UserError(f"{option}: {source} is not a run; leave it out")
    if is_lora(source):
        opened = None if base is None else open_sdxl(base, tokenizers=tokenizers)
        parts = sdxl_parts() if opened is None else opened.parts
        return _Adapter(read_lora(source, parts), parts, opened)
    model = open_sdxl(source, base=base, tokenizers=tokenizers)
    return _Source(model, None, metadata(model))


def _unmerged(found: _Source, source: Path, to: str, merge: float | None) -> _Source:
    if to in _OF_LORAS:
        raise UserError(f"--to {to}: {source} is a whole model, not a LoRA; use single-file or diffusers")
    if merge is not None:
        raise UserError(f"--merge {merge:g}: {source} is not a LoRA; leave it out")
    return found


def _merged(found: _Adapter, to: str, merge: float | None) -> _Source:
    """A LoRA's base with the LoRA merged in."""
    if merge is None:
        raise UserError(
            f"--to {to}: {found.lora.path} is a LoRA; --merge 1.0 adds it to its base and writes that, "
            "--to kohya writes the LoRA"
        )
    if not abs(merge) <= _HEAVIEST:
        raise UserError(f"--merge {merge:g}: write a weight such as 1.0, at most {_HEAVIEST:g}")
    if found.base is None:
        raise UserError(f"--merge {merge:g}: name the model that {found.lora.path} is merged into, as --base")
    model = with_lora(found.base, found.lora, merge)
    return _Source(model, None, metadata(model))


def _write_lora(
    found: _Adapter, to: str, out: Path, dtype: str, merge: float | None, with_metadata: bool
) -> None:
    if merge is not None:
        raise UserError(f"--merge {merge:g} writes a whole model: use --to single-file or diffusers with it")
    if dtype != "auto":
        raise UserError(f"--dtype {dtype}: a LoRA's factors are written as they are; leave it out")
    if to == "kohya":
        save_kohya(found.lora, found.parts, out, metadata=with_metadata)
    else:
        save_peft(found.lora, out)


def _run(
    source: Path, base: Path | None, tokenizers: Path | None, step: int | None, which: str
) -> _Source | _Adapter:
    record = read_run(source)
    assert record is not None
    if which == BEST:
        step = _best_step(source, record.run)
    results = source / which if which == AVERAGE else source
    if which == AVERAGE and not results.is_dir():
        raise UserError(f"{source} has no average of its weights (ema.half_life), or is not finished")
    config = _config(source, record.config)
    others = {name: path for name, path in (("path", base), ("tokenizers", tokenizers)) if path is not None}
    config = config.model_copy(update={"model": config.model.model_copy(update=others)})
    start = config.adapter.start
    adapter = config.adapter.model_copy(update={"start": None})  # the trained LoRA contains it
    try:
        model = open_model(config.model_copy(update={"adapter": adapter}))
    except UserError as error:
        raise UserError(f"{error}; --base names the start model, if it has moved") from None
    if config.adapter.kind == "lora":
        trained_lora = _trained_lora(results, source, record.run, step, config, model, start)
        return _Adapter(trained_lora, model.parts, model)
    trained = _trained(results, source, record.run, step)
    expected = model.parts["unet"].shapes
    if {name: tuple(stored.shape) for name, stored in trained.stored.items()} != expected:
        raise UserError(
            f"{source} does not hold a UNet like that of {model.path}: --base names another model"
        )
    return _Source(model, trained, metadata_of(config, model, source, step))


def _config(source: Path, recorded: dict[str, dict[str, object]]) -> Config:
    """The recorded settings of a run that an export needs."""
    needed = ("model", "data", "train", "objective", "adapter", "optim", "preview", "export")
    sections = {name: recorded[name] for name in needed if name in recorded}
    return parse_config(sections, where=str(source / RECORD))


def _trained_lora(
    results: Path,
    source: Path,
    run: str,
    step: int | None,
    config: Config,
    model: Pipeline,
    start: Path | None,
) -> LoraFile:
    """The LoRA of a run's result, or of a checkpoint, which has neither alphas nor untrained factors."""
    if step is None and (results / "lora").is_dir():
        return read_lora(results / "lora" / "lora_kohya.safetensors", model.parts)
    checkpoint = _checkpoint(source, run, step)
    lora = read_lora(checkpoint.path / "model.safetensors", model.parts)
    lora = replace(lora, metadata=lora_metadata_of(config, model, source, checkpoint.step) or {})
    if start is not None:
        began = read_lora(start, model.parts)
        layers = {n: f._replace(scale=began.parts["unet"][n].scale) for n, f in lora.parts["unet"].items()}
        return replace(lora, parts={**began.parts, "unet": layers})
    rank = config.adapter.rank
    scale = (config.adapter.alpha or rank) / rank
    parts = {
        component: {layer: factors._replace(scale=scale) for layer, factors in layers.items()}
        for component, layers in lora.parts.items()
    }
    return replace(lora, parts=parts)


def _trained(results: Path, source: Path, run: str, step: int | None) -> Loaded:
    """The UNet of a run's result, or of a checkpoint.

    Raises:
        UserError: there is neither, or no checkpoint of that step.
    """
    if step is None and (results / "unet").is_dir():
        return Loaded(folder_part("unet", results / "unet").stored)
    header = read_header(_checkpoint(source, run, step).path / "model.safetensors")
    return Loaded({name: whole(header.path, entry) for name, entry in header.tensors.items()})


def _checkpoint(source: Path, run: str, step: int | None) -> Checkpoint:
    """A run's checkpoint of a step, which may be the best one, or the newest.

    Raises:
        UserError: the checkpoint is missing or cannot be used.
    """
    best = CheckpointStore(source / BEST, 1, run)
    if step is not None and step in (number for number, _ in best.found()):
        return best.at(step)
    store = CheckpointStore(source / "checkpoints", 1, run)
    checkpoint = store.newest() if step is None else store.at(step)
    if checkpoint is None:
        raise UserError(f"{source} has no result and no checkpoint yet: train it first")
    return checkpoint


def _best_step(source: Path, run: str) -> int:
    kept = CheckpointStore(source / BEST, 1, run).newest()
    if kept is None:
        raise UserError(f"{source} has no best step (train.best): leave --best out, or name a --step")
    return kept.step


def _check_target(source: Path, to: str, out: Path, force: bool) -> None:
    """Raise `UserError` where the target must not be written."""
    folder = to in ("diffusers", "peft")
    if not folder and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the file's name must end in .safetensors")
    if not source.exists():
        raise UserError(
            f"{source} not found: name a run's folder, a LoRA's or model's .safetensors file, or a folder"
        )
    real, inside = out.resolve(), source.resolve()
    if inside in real.parents:
        raise UserError(f"--out {out} lies in the source: write elsewhere")
    if not out.exists() and not out.is_symlink():  # a link to nothing counts as existing
        return
    if real == inside or inside.is_relative_to(real):
        what = "is the source itself" if real == inside else "holds the source"
        if out.is_dir() or not force:
            raise UserError(f"--out {out} {what}: write elsewhere")
    if not force:
        raise UserError(f"--out {out} exists: name another, or replace it with --force")
    if out.is_dir() != folder:
        raise UserError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}: name another")
    index = "model_index.json" if to == "diffusers" else "adapter_config.json"
    if out.is_dir() and any(out.iterdir()) and not (out / index).is_file():
        raise UserError(f"--out {out} is a folder that holds other things than a model: name another")
