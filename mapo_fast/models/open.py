"""Opening an SDXL model: a diffusers pipeline folder or a single file, with parts of it replaced.

Nothing is loaded, and of files of weights nothing but the header is read. A path that exists is always a
path: nothing is looked up on a hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mapo_fast.models.configs import PipelineConfig, checked
from mapo_fast.models.from_shapes import SCHEDULER
from mapo_fast.models.merge import with_loras, with_start_lora
from mapo_fast.models.parts import NAMES, Part, file_part, folder_part, renamed_part
from mapo_fast.models.pipeline import Pipeline, Scheduler, check_pipeline
from mapo_fast.models.recognise import (
    Noise,
    few_steps,
    part_alone,
    recognise,
    refuse_other_unets,
    stated_noise,
)
from mapo_fast.models.sdxl import CONFIGS, WEIGHTS
from mapo_fast.models.start import read_start
from mapo_fast.models.tokenizers import Tokenizers
from mapo_fast.settings.loras import parse_lora
from mapo_fast.settings.schema import Config, TrainConfig
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import read_json, unreadable
from mapo_fast.util.progress import Callbacks
from mapo_fast.util.tensorheader import read_header


def open_model(config: Config, path: Path | None = None, *, weights: bool = True) -> Pipeline:
    """The model that a config names.

    Args:
        config: its `[model]`, and the noise schedule settings of `[train]`.
        path: a model to open instead of `model.path`.
        weights: False where the configs are enough: a folder's weights and vocabularies may then be missing.

    Raises:
        UserError: naming the missing or wrong part.
    """
    model = config.model
    opened = open_sdxl(
        path or model.path,
        model.vae,
        scheduler_overrides(config.train),
        unet=model.unet,
        base=model.base,
        tokenizers=model.tokenizers,
        weights=weights,
    )
    opened = with_loras(opened, [parse_lora("model.lora", text) for text in model.lora])
    return with_start_lora(opened, read_start(config, opened.parts))


def introduce(model: Pipeline, callbacks: Callbacks) -> None:
    """Report what the model predicts and how that is known, then the remarks about it."""
    callbacks.message(f"{model.path} predicts {prediction_of(model)}")
    for remark in model.remarks:
        callbacks.warning(remark)


def prediction_of(model: Pipeline) -> str:
    """A model's prediction type and how it is known, in words."""
    config = model.scheduler_config
    prediction = str(config.get("prediction_type", "epsilon")).replace("_", "-").removesuffix("-prediction")
    zero = " with zero terminal SNR" if config.get("rescale_betas_zero_snr") else ""
    return f"{prediction}{zero}: {model.scheduler.why}"


def scheduler_overrides(config: TrainConfig) -> dict[str, Any]:
    """The scheduler settings that are set in `[train]`."""
    overrides: dict[str, Any] = {}
    if config.prediction != "auto":
        overrides["prediction_type"] = config.prediction
    if config.zero_terminal_snr != "auto":
        overrides["rescale_betas_zero_snr"] = config.zero_terminal_snr == "on"
    return overrides


def open_sdxl(
    path: Path,
    vae: Path | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    unet: Path | None = None,
    base: Path | None = None,
    tokenizers: Path | None = None,
    weights: bool = True,
) -> Pipeline:
    """Check a model and its parts; nothing is loaded.

    Args:
        path: a diffusers SDXL pipeline folder, or a single `.safetensors` file.
        vae: another VAE, a folder or a file.
        overrides: settings that replace those of the scheduler's config.
        unet: another UNet, a folder or a file.
        base: a model that has the text encoders and the VAE that a file lacks.
        tokenizers: a folder with `tokenizer/` and `tokenizer_2/`, in place of the model's or CLIP's.
        weights: False where the configs are enough: a folder's weights and vocabularies may then be missing.

    Raises:
        UserError: naming the missing or wrong part.
    """
    others = {name: other for name, other in (("vae", vae), ("unet", unet)) if other is not None}
    with _readable("model.path", path):
        found = _find("model.path", path, [part for part in WEIGHTS if part not in others], weights)
    for name, other in others.items():
        with _readable(f"model.{name}", other):
            part, said = _replacement(name, other, path, weights)
        found.parts[name] = part
        if name == "unet" and said is not None:
            found.scheduler = _scheduler(said, other)
    if lacking := [part for part in WEIGHTS if part not in found.parts]:
        _complete(found, path, base, lacking, weights)
    if tokenizers is not None:
        with _readable("model.tokenizers", tokenizers):
            found.tokenizers = _tokenizers(tokenizers, weights)
    scheduler, overrides = found.scheduler, overrides or {}
    found.remarks += _disagreements(scheduler, overrides)
    why = "train.prediction says so" if "prediction_type" in overrides else scheduler.why
    model = Pipeline(
        path,
        {name: found.parts[name] for name in WEIGHTS},
        found.tokenizers,
        replace(scheduler, config={**scheduler.config, **overrides}, why=why),
        found.zeros_for_empty_prompt,
        tuple(found.remarks),
    )
    try:
        check_pipeline(model)
    except UserError as error:
        raise _blamed(error, others) from None
    return model


@dataclass
class _Found:
    """The parts of a model found in a folder or file."""

    parts: dict[str, Part]
    tokenizers: Tokenizers
    scheduler: Scheduler
    zeros_for_empty_prompt: bool = True
    remarks: list[str] = field(default_factory=list)


def _find(setting: str, path: Path, wanted: list[str], weights: bool) -> _Found:
    """The wanted parts of a model.

    Args:
        setting: the setting that names the path, for messages.
        path: a folder or a file.
        wanted: components.
        weights: whether to look at a folder's weights.
    """
    if path.is_dir():
        return _find_in_folder(path, wanted, weights)
    if not path.exists():
        raise UserError(
            f"model not found: {path} ({setting} must be a diffusers SDXL pipeline folder or a single "
            ".safetensors file)"
        )
    header = read_header(path)
    prefixes, said = recognise(header)
    parts = {part: file_part(part, header, prefixes[part]) for part in wanted if part in prefixes}
    found = _Found(parts, Tokenizers(None), _scheduler(said, path))
    if what := few_steps(header.metadata):
        found.remarks.append(_distilled(path, f"its metadata, {what}"))
    return found


def _find_in_folder(path: Path, wanted: list[str], weights: bool) -> _Found:
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{path} is not a diffusers pipeline folder: model_index.json is missing")
    stated = read_json(index)
    config = checked(PipelineConfig, stated, index)
    if config.requires_aesthetics_score:
        raise UserError(
            f"{index} has requires_aesthetics_score = true: this is the SDXL refiner, which "
            "cannot be trained here"
        )
    for component in (*wanted, "scheduler"):
        if not (path / component / CONFIGS[component]).is_file():
            missing = path / component / CONFIGS[component]
            raise UserError(f"{path} is not an SDXL pipeline: {missing} is missing")
    tokenizers = Tokenizers(path)
    tokenizers.check(files=weights)
    parts = {part: folder_part(part, path / part, weights=weights) for part in wanted}
    where = path / "scheduler" / CONFIGS["scheduler"]
    named = stated.get("scheduler")
    sampler = named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else None
    scheduler = Scheduler(read_json(where), where, f"its {where.relative_to(path)}", sampler)
    found = _Found(parts, tokenizers, scheduler, config.force_zeros_for_empty_prompt)
    if what := _few_steps(scheduler):
        found.remarks.append(_distilled(path, what))
    return found


def _few_steps(scheduler: Scheduler) -> str | None:
    """The reason to think that a model is distilled to sample in a few steps, from its scheduler; or None."""
    name, spacing = scheduler.config.get("_class_name"), scheduler.config.get("timestep_spacing")
    if name in ("LCMScheduler", "TCDScheduler"):
        return f"its scheduler is {name}"
    if spacing == "trailing" and not scheduler.config.get("rescale_betas_zero_snr"):
        return "its scheduler has timestep_spacing = 'trailing', as those of Turbo and Lightning have"
    return None


def _distilled(path: Path, why: str) -> str:
    return (
        f"{path} looks like a model distilled to sample in a few steps ({why}): training on the whole noise "
        "schedule undoes that; take the model that it was made from"
    )


def _scheduler(said: Noise, where: Path) -> Scheduler:
    """SDXL's schedule with a prediction."""
    config = {
        **SCHEDULER,
        "prediction_type": said.prediction,
        "rescale_betas_zero_snr": said.zero_terminal_snr,
    }
    return Scheduler(config, where, said.why, stated=said.stated)


def _replacement(component: str, path: Path, model: Path, weights: bool) -> tuple[Part, Noise | None]:
    """A UNet or VAE that replaces the model's own, and its prediction where its file names one.

    Raises:
        UserError: the part cannot be used; the message names the setting.
    """
    kind = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[component]
    is_folder = path.is_dir()
    if not path.exists():
        raise UserError(
            f"model.{component} not found: {path} (it must be a diffusers {kind} folder, or a .safetensors "
            "file)"
        )
    try:
        if is_folder:
            own = path / component
            folder = own if not (path / CONFIGS[component]).exists() and own.is_dir() else path
            return folder_part(component, folder, weights=weights), None
        header = read_header(path)
        prefix = part_alone(header, component)
        if prefix is None:
            own_config = _find("model.path", model, [component], weights=False).parts
            if component not in own_config:
                raise UserError(f"{path} has diffusers' names and no config, and {model} has no {component}")
            return renamed_part(own_config[component], header), stated_noise(header)
        if component == "unet":
            refuse_other_unets(header, prefix)
        return file_part(component, header, prefix), stated_noise(header)
    except UserError as error:
        raise UserError(f"model.{component} cannot be used: {error}") from None


def _blamed(error: UserError, others: Mapping[str, Path]) -> UserError:
    """The error, prefixed with the setting that names the part in question."""
    for name, path in others.items():
        if str(path) in str(error):
            return UserError(f"model.{name} cannot be used: {error}")
    return error


def _complete(found: _Found, path: Path, base: Path | None, lacking: list[str], weights: bool) -> None:
    """Take the parts that a file lacks from another model.

    Raises:
        UserError: `model.base` is unset, or lacks the parts too.
    """
    names = " and ".join(NAMES[part] for part in lacking)
    if base is None:
        raise UserError(f"{path} has no {names}: set model.base to a model that they may be taken from")
    with _readable("model.base", base):
        other = _find("model.base", base, lacking, weights)
    if missing := [part for part in lacking if part not in other.parts]:
        raise UserError(f"{path} has no {names}, and model.base {base} has no {NAMES[missing[0]]} either")
    found.parts.update(other.parts)
    found.tokenizers = other.tokenizers
    found.remarks.append(f"{path} has no {names}: taken from model.base {base}")


def _tokenizers(path: Path, weights: bool) -> Tokenizers:
    if not path.is_dir():
        raise UserError(
            f"model.tokenizers not found: {path} (it must be a folder with tokenizer/ and tokenizer_2/, as a "
            "pipeline has them)"
        )
    try:
        found = Tokenizers(path)
        found.check(files=weights)
    except UserError as error:
        raise UserError(f"model.tokenizers cannot be used: {error}") from None
    return found


def _disagreements(scheduler: Scheduler, overrides: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about settings that contradict the model."""
    for key, setting, usual in (
        ("prediction_type", "prediction", "epsilon"),
        ("rescale_betas_zero_snr", "zero_terminal_snr", False),
    ):
        states = scheduler.config.get(key, usual)
        if scheduler.stated and key in overrides and overrides[key] != states:
            yield (
                f"train.{setting} sets {key} = {overrides[key]!r}, the model has {states!r} "
                f"({scheduler.why}): if the model is right, training makes it worse"
            )


@contextmanager
def _readable(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unreadable(f"{name} = {path}", error) from None
