"""Compare models by their images: means, win rates against the first, diversity, prompt by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mapo_fast.score.clip import Clip
from mapo_fast.score.manifest import Made, paired
from mapo_fast.score.scorer import Scorer
from mapo_fast.score.scores import Scored, ScoreFile, open_image
from mapo_fast.score.statistics import Units, by_prompt, mean, win_rate

SCORES = "scores.jsonl"


def evaluate(
    folders: Mapping[str, Path],
    scorers: Mapping[str, Scorer],
    out: Path,
    progress: Callable[[str, int, int], None] = lambda scorer, total, done: None,
) -> dict[str, Any]:
    """Score the images of several models and compare them with the first.

    Args:
        folders: images by the model's name, each a folder with a manifest of the same prompts and seeds.
        scorers: by name.
        out: folder for `scores.jsonl`; what is in it is not scored again.
        progress: told the scorer, the number of images, and how many are done.

    Returns:
        What `evaluation.json` holds: `models`, `settings` of sampling, `prompts` (with the scores of each
        model), and for each scorer `means` and `against_first`.

    Raises:
        UserError: images that cannot be compared or read, a score that is not finite. Scores so far are kept.
    """
    models = dict(zip(folders, paired([*folders.values()]), strict=True))
    first = next(iter(models))
    numbers = _prompt_numbers(models[first])
    file = ScoreFile(out / SCORES)
    by_scorer: dict[str, dict[str, Units]] = {}
    images = [Scored(made.path, made.prompt) for one in models.values() for made in one]
    for name, scorer in scorers.items():
        found = file.score(name, scorer, images, partial(progress, name, len(images)))
        count = len(models[first])
        by_scorer[name] = {
            model: by_prompt(found[i * count : (i + 1) * count], numbers) for i, model in enumerate(models)
        }
    prompts = [*dict.fromkeys(made.prompt for made in models[first])]
    clips = [clip for one in scorers.values() if isinstance(clip := getattr(one, "clip", None), Clip)]
    return {
        "models": {model: str(folder) for model, folder in folders.items()},
        "settings": {model: images[0].settings for model, images in models.items()},
        "images_per_model": len(models[first]),
        "scorers": {name: {"version": one.version, "sha256": one.sha256} for name, one in scorers.items()},
        "results": {name: _compared(scores, first) for name, scores in by_scorer.items()},
        "diversity": {m: diversity(images, clips[0]) for m, images in models.items()} if clips else {},
        "prompts": [
            {
                "prompt": prompt,
                "scores": {
                    name: {m: v.means[i] for m, v in scores.items()} for name, scores in by_scorer.items()
                },
            }
            for i, prompt in enumerate(prompts)
        ],
    }


def diversity(images: Sequence[Made], clip: Clip) -> float | None:
    """Mean cosine distance between the images of a prompt's seeds, over prompts; None with one seed each."""
    by_prompt: dict[str, list[Path]] = {}
    for made in images:
        by_prompt.setdefault(made.prompt, []).append(made.path)
    distances = []
    for paths in by_prompt.values():
        features = [clip.images([open_image(path)])[0] for path in paths]
        pairs = [1 - float(a @ b) for a, b in itertools.combinations(features, 2)]
        if pairs:
            distances.append(sum(pairs) / len(pairs))
    return sum(distances) / len(distances) if distances else None


def _compared(scores: Mapping[str, Units], first: str) -> dict[str, Any]:
    start = scores[first]
    return {
        "means": {model: mean(units)._asdict() for model, units in scores.items()},
        "against_first": {
            model: win_rate(units.means, start.means)._asdict()
            | {"change": mean(_change(units, start))._asdict()}
            for model, units in scores.items()
            if model != first
        },
    }


def _change(units: Units, start: Units) -> Units:
    return Units([a - b for a, b in zip(units.totals, start.totals, strict=True)], units.counts)


def _prompt_numbers(images: Sequence[Made]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(made.prompt, len(numbers)) for made in images]
