"""Metadata in the files of a run's result, for programs that show models.

Prompts and paths are in the metadata only with `export.prompts`. Dates never are: the same run gives the same
bytes.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from mapo_fast.data.images.decode import ImageProblemError, decode_image
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.single_file import metadata
from mapo_fast.settings.schema import Config

THUMBNAIL = 256
"""Largest side of a thumbnail in pixels."""


def title_of(config: Config, model: Pipeline) -> str:
    """The result's title, which programs show."""
    source = model.parts["unet"].header
    name = "SDXL" if source is None else source.metadata.get("modelspec.title", "SDXL")
    return config.export.title or f"{name}, aligned by {config.objective.name}"


def metadata_of(config: Config, model: Pipeline, run: Path, step: int | None = None) -> dict[str, str] | None:
    """The metadata of a single file with a run's result; None where the config wants none.

    Args:
        config: the run's settings.
        model: the start model.
        run: the run's folder.
        step: step of the checkpoint that the file is made from; None for the result.
    """
    return {**metadata(model), **_of_both(config, model, run, step)} if config.export.metadata else None


def lora_metadata_of(
    config: Config, model: Pipeline, run: Path, step: int | None = None
) -> dict[str, str] | None:
    """The metadata of a LoRA's files; arguments as in `metadata_of`."""
    if not config.export.metadata:
        return None
    schedule = model.scheduler_config
    found = {
        "ss_steps": str(config.train.steps if step is None else step),
        "ss_learning_rate": str(config.optim.lr),
        "ss_optimizer": config.optim.name,
        "ss_zero_terminal_snr": str(bool(schedule.get("rescale_betas_zero_snr"))),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if schedule.get("prediction_type") == "v_prediction" else "epsilon",
    }
    if config.export.trigger is not None:
        found["modelspec.trigger_phrase"] = config.export.trigger
    return found | _of_both(config, model, run, step)


def _of_both(config: Config, model: Pipeline, run: Path, step: int | None) -> dict[str, str]:
    found = {"modelspec.title": title_of(config, model)}
    if (thumbnail := _thumbnail(run / "previews", step)) is not None:
        found["modelspec.thumbnail"] = thumbnail
    if config.export.prompts:
        found["mapo_fast.prompts"] = json.dumps(config.preview.prompts, ensure_ascii=False)
        found["mapo_fast.data"] = str(config.data.source or config.data.cache)
    return found


def _thumbnail(previews: Path, step: int | None) -> str | None:
    """The first preview of a step, or of the last one, as a data URL; None where none can be read."""
    folders = sorted(previews.glob("step-*")) if step is None else [previews / f"step-{step:08d}"]
    files = sorted(folders[-1].glob("00*.png")) if folders else []
    if not files:
        return None
    try:
        image = decode_image(files[0].read_bytes())
    except (OSError, ImageProblemError):  # the file may have been moved or changed
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(buffer := io.BytesIO(), "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
