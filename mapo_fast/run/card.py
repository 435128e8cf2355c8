"""The model card of a finished run: `README.md` next to the result, by Hugging Face's conventions.

The card says what was trained, on how much, with which settings, and what the held-out pairs show. Base model
and licence come from the start model's metadata and are left out where it has none. Prompts are in the card
only with `export.prompts`; paths never are.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mapo_fast import __version__
from mapo_fast.data.cache import PairCache
from mapo_fast.models.open import prediction_of
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.run.preview_files import file_name, previews_folder
from mapo_fast.settings.schema import Config
from mapo_fast.util.files import atomic_path, sha256_file

CARD = "README.md"


def write_card(config: Config, model: Pipeline, cache: PairCache, title: str) -> None:
    """Write the card of a run whose result and log are written.

    Args:
        config: the run's settings.
        model: the start model.
        cache: the training data.
        title: the result's title.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    output = config.train.output
    sections = [
        f"---\n{yaml.safe_dump(_front(config, model), allow_unicode=True, sort_keys=False)}---",
        f"# {_text(title)}",
        f"Trained with mapo_fast {__version__} by `{config.objective.name}`, as a "
        f"{'LoRA' if config.adapter.kind == 'lora' else 'full fine-tune of the UNet'}. "
        f"It predicts {_text(prediction_of(model).partition(':')[0])}.",
        *_training(config, cache),
        *_held_out(output),
        *_previews(config),
        *_use(config),
        *_files(config),
    ]
    with atomic_path(output / CARD) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front(config: Config, model: Pipeline) -> dict[str, Any]:
    header = model.parts["unet"].header
    stated = {} if header is None else header.metadata
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if base := stated.get("modelspec.title"):
        front["base_model"] = base
    if licence := stated.get("modelspec.license"):
        front["license"] = licence
    kind = ["lora"] if config.adapter.kind == "lora" else []
    front["tags"] = ["stable-diffusion-xl", "preference-optimization", config.objective.name, *kind]
    return front


def _training(config: Config, cache: PairCache) -> Iterator[str]:
    what = "pairs" if cache.paired else "images"
    skipped = cache.index.content.get("summary", {}).get("skipped", {})
    objective = config.objective.model_dump(exclude={"name", "reference"})
    rows: list[tuple[str, object]] = [
        (f"{what}, trained on", len(cache.train)),
        (f"{what}, held out", len(cache.held_out)),
        ("steps", config.train.steps),
        (f"{what} per step and process", config.train.pairs_per_batch * config.train.accumulation),
        ("optimizer", config.optim.name),
        ("learning rate", f"{config.optim.lr:g}"),
        ("resolution", config.data.resolution),
        ("precision", config.train.precision),
        *((f"objective.{name}", f"{value:g}") for name, value in objective.items() if type(value) is float),
    ]
    if skipped:
        rows.insert(2, (f"{what}, skipped", sum(skipped.values())))
    if config.adapter.kind == "lora":
        rows += [("rank", config.adapter.rank), ("alpha", config.adapter.alpha or config.adapter.rank)]
    yield "## Training"
    yield "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _held_out(output: Path) -> Iterator[str]:
    """The last evaluation against the start model, with 95 % intervals."""
    log = output / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    found = [entry for entry in map(json.loads, lines) if entry.get("event") == "evaluation"]
    if not found or not found[-1].get("pairs"):
        return
    last = found[-1]
    yield "## Held-out pairs"
    yield f"{last['pairs']} pairs that were not trained on, against the start model, with 95 % intervals:"
    names = (
        ("accuracy_change", "preference accuracy"),
        ("margin_change", "margin"),
        ("chosen_error_change", "chosen image's denoising error"),
    )
    table = ["| | change | from | to |", "|---|---|---|---|"]
    for key, name in names:
        if isinstance(change := last.get(key), dict):
            values = (change.get(part) for part in ("mean", "low", "high"))
            table.append(f"| {name} | {' | '.join('–' if v is None else f'{v:+.4g}' for v in values)} |")
    yield "\n".join(table)


def _previews(config: Config) -> Iterator[str]:
    """Previews of the start and the end side by side."""
    folders = sorted(previews_folder(config).glob("step-*"))
    if len(folders) < 2:
        return
    yield "## Before and after"
    rows = ["| before | after |", "|---|---|"]
    for index, prompt in enumerate(config.preview.prompts):
        side = config.data.resolution
        name = file_name(index, prompt, (side, side), side)
        cells = [f"![](previews/{folder.name}/{name})" for folder in (folders[0], folders[-1])]
        rows.append(f"| {' | '.join(cells)} |")
        if config.export.prompts:
            rows.append(f"| {_text(prompt)} | |")
    yield "\n".join(rows)


def _use(config: Config) -> Iterator[str]:
    yield "## Use"
    if config.adapter.kind == "lora":
        yield 'In diffusers: `pipe.load_lora_weights("lora")`, from this folder, on the base model.'
        yield "In ComfyUI, A1111 and Forge: `lora/lora_kohya.safetensors`, as any LoRA."
    else:
        yield 'In diffusers: `UNet2DConditionModel.from_pretrained("unet")`, from this folder, in the base.'
        if (config.train.output / "model.safetensors").is_file():
            yield "In ComfyUI, A1111 and Forge: `model.safetensors`, as any checkpoint."


def _files(config: Config) -> Iterator[str]:
    output = config.train.output
    places = ("model.safetensors", "unet/*.safetensors", "lora/*.safetensors")
    files = sorted(file for place in places for file in output.glob(place))
    yield "## Files"
    rows = [f"| `{file.relative_to(output).as_posix()}` | `{sha256_file(file)}` |" for file in files]
    yield "\n".join(["| file | SHA-256 |", "|---|---|", *rows])


def _text(value: str) -> str:
    """Text escaped for Markdown and HTML, on one line."""
    shown = html.escape(" ".join(value.split()))
    return "".join(f"\\{c}" if c in "\\`*_[]|#!<>" else c for c in shown)
