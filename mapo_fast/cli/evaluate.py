"""`mapo-fast evaluate`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mapo_fast.cli.app import allow
from mapo_fast.cli.options import Code
from mapo_fast.util.console import Terminal, output_may_fail
from mapo_fast.util.errors import UserError

if TYPE_CHECKING:
    from mapo_fast.score.manifest import Made
    from mapo_fast.settings.loras import Lora


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Models (a file, a pipeline folder, a run), or folders of images by mapo-fast sample. "
            "The others are compared with the first."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the scores and the page.")],
    score: Annotated[
        list[str] | None,
        typer.Option("--score", help="Scorer, NAME or NAME=PATH (docs/scorers.md). May be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File of prompts; needed where a model is named.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Images of each prompt and model.")] = 1,
    preset: Annotated[
        str | None, typer.Option("--preset", help="comfyui: sample as ComfyUI's own sampler does.")
    ] = None,
    blind: Annotated[
        Path | None, typer.Option("--blind", help="Also write a page for a blind comparison of two folders.")
    ] = None,
    votes: Annotated[
        int | None, typer.Option("--votes", help="Votes on that page; one for each image by default.")
    ] = None,
    strip: Annotated[
        Path | None,
        typer.Option(
            "--strip", help="A LoRA; after the votes the page shows it on the first model, at 0.4 to 1.2."
        ),
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option("--trained", help="A run or a cache; its prompts are reported apart on that page."),
    ] = None,
    code: Code = None,
) -> None:
    """Compare models by their images: scores, win rates with intervals, a blind comparison."""
    from mapo_fast.score.manifest import differences, paired
    from mapo_fast.util.files import atomic_path, disk_errors

    output_may_fail()
    allow(code, None)
    if strip is not None and blind is None:
        raise UserError("--strip is shown on the page of a blind comparison: add --blind out.html")
    if not score and blind is None:
        raise UserError("say how to compare: --score NAME=PATH (docs/scorers.md), or --blind out.html")
    from mapo_fast.score import builtin  # noqa: F401  registers the scorers of this package
    from mapo_fast.score.scorer import load_scorer

    callbacks = Terminal()
    names = _names(models)
    scorers = dict(
        load_scorer(text) for text in score or ()
    )  # what is wrong with one is said before sampling
    asked = Asked(prompts, seeds, preset, callbacks)
    folders = _images(dict(zip(names, models, strict=True)), asked, out)
    for file in filter(None, (blind, out / "evaluation.html" if score else None)):
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no file that can be written: choose another name")
    images = dict(zip(names, paired(folders), strict=True))
    for remark in differences(images):
        callbacks.warning(remark)
    if blind is not None:
        from mapo_fast.score.blind import write_blind
        from mapo_fast.score.trained import prompts_of

        seen = frozenset() if trained is None else prompts_of(trained)
        strengths = None
        if strip is not None:
            strengths = _strip(models[0], strip, asked, images[names[0]][0].prompt, out / "images" / "strip")
        with disk_errors(blind):
            count = write_blind(blind, images, votes, seen, strengths)
        callbacks.message(f"open {blind} in a browser: {count} votes by the arrow keys, then the answer")
    if not score:
        return

    from mapo_fast.score.evaluate import evaluate as run
    from mapo_fast.score.page import as_lines, write_evaluation

    shown: list[str] = []

    def progress(name: str, total: int, done: int) -> None:
        if name not in shown:
            shown.append(name)
            callbacks.message(f"{name}: {total} images")

    result = run(dict(zip(names, folders, strict=True)), scorers, out, progress)
    with disk_errors(out):
        with atomic_path(out / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        write_evaluation(out / "evaluation.html", result, images)
    for line in as_lines(result):
        callbacks.message(line)
    callbacks.message(f"page: {out / 'evaluation.html'}, figures: {out / 'evaluation.json'}")


_STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)


class Asked(NamedTuple):
    """What to sample, where a model is named."""

    prompts: Path | None
    seeds: int
    preset: str | None
    callbacks: Terminal


def _images(models: dict[str, Path], asked: Asked, out: Path) -> list[Path]:
    """A folder of images of each model: what is named, or made now in `OUT/images/NAME`."""
    from mapo_fast.score.manifest import MANIFEST

    folders, texts = [], None
    for name, model in models.items():
        if (model / MANIFEST).is_file():
            folders.append(model)
            continue
        if asked.prompts is None:
            raise UserError(f"{model} has no images of mapo-fast sample: add --prompts FILE to make them")
        from mapo_fast.data.prompt_files import read_prompts

        if texts is None:
            read = read_prompts(asked.prompts)
            texts = read.texts
            for remark in read.remarks:
                asked.callbacks.warning(remark)
        folders.append(out / "images" / name)
        asked.callbacks.message(f"images of {name}")
        _sample(model, [], texts, asked, folders[-1])
    return folders


def _sample(model: Path, loras: list[Lora], texts: Sequence[str], asked: Asked, folder: Path) -> None:
    from mapo_fast.models.sampling import sampling
    from mapo_fast.score.sample import open_for_sampling, sample

    how = sampling(asked.preset, {}, {})
    sample(open_for_sampling(model, loras), texts, range(asked.seeds), how, folder, asked.callbacks)


def _strip(model: Path, lora: Path, asked: Asked, prompt: str, out: Path) -> dict[str, Made]:
    """One prompt by the first model with a LoRA at several strengths."""
    from mapo_fast.score.manifest import MANIFEST, read
    from mapo_fast.settings.loras import Lora

    if (model / MANIFEST).is_file():
        raise UserError(f"--strip adds the LoRA to the first model: name the model instead of {model}")
    found = {}
    for strength in _STRENGTHS:
        folder = out / f"{strength:g}"
        _sample(model, [Lora(lora, strength)], [prompt], asked._replace(seeds=1), folder)
        found[f"{strength:g}"] = read(folder)[0]
    return found


def _names(folders: list[Path]) -> list[str]:
    """Names of the models: those of their files, or their paths where two have one name."""
    short = [folder.resolve().stem if folder.is_file() else folder.resolve().name for folder in folders]
    paths = [re.sub(r"[^\w.-]+", "_", str(folder)).strip("_") for folder in folders]
    names = short if len({*short}) == len(short) else paths
    if len({*names}) < len(names):
        raise UserError("a model is named twice: name different ones")
    return names
