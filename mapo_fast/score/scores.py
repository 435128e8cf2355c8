"""Scores of images, kept in a file, so that no image is scored twice.

A score is a function of the image's file, its prompt, the scorer, its weights and its version. `scores.jsonl`
has a line for each, appended as it is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mapo_fast.data.images.decode import ImageProblemError, decode_image
from mapo_fast.score.scorer import Scorer
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, os_error, parse_json, read_bytes

_BATCH = 8
_LARGEST_IMAGE = 2**28


class Scored(NamedTuple):
    """An image to score."""

    path: Path
    prompt: str


class ScoreFile:
    """A store of scores.

    Args:
        path: `scores.jsonl`; made when the first score is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, float] = {}
        if path.is_file():
            for line in read_bytes(path, 2**30).decode("utf-8", "replace").splitlines():
                try:
                    entry = parse_json(line)
                    self._known[str(entry["key"])] = float(entry["score"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a kill cut the line short, or somebody edited it: it is scored again

    def score(
        self,
        name: str,
        scorer: Scorer,
        images: Sequence[Scored],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[float]:
        """The scores of images, in order.

        Args:
            name: of the scorer.
            scorer: scores what is not known.
            images: what to score.
            progress: told how many are done.

        Raises:
            UserError: an image cannot be read, or its score is not finite. What was scored is kept.
        """
        keys = [_key(name, scorer, *image) for image in images]
        todo = [i for i, key in enumerate(keys) if key not in self._known]
        for start in range(0, len(todo), _BATCH):
            part = todo[start : start + _BATCH]
            values = scorer([open_image(images[i].path) for i in part], [images[i].prompt for i in part])
            for i, value in zip(part, values, strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"{name} gives {images[i].path} {value}: leave the image or the scorer out"
                    )
                self._keep(keys[i], float(value), name, images[i])
            progress(len(keys) - len(todo) + start + len(part))
        return [self._known[key] for key in keys]

    def _keep(self, key: str, score: float, name: str, image: Scored) -> None:
        line = {"key": key, "scorer": name, "image": image.path.name, "score": score}
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._known[key] = score


def _key(name: str, scorer: Scorer, path: Path, prompt: str) -> str:
    digest = hashlib.sha256(_bytes(path)).hexdigest()
    text = "\0".join((name, scorer.version, scorer.sha256, digest, prompt))
    return hashlib.sha256(text.encode()).hexdigest()


def open_image(path: Path) -> Image.Image:
    """Decode an image as `prepare` does: bounded, to sRGB, without starting a program."""
    try:
        return decode_image(_bytes(path)).convert("RGB")
    except ImageProblemError as error:
        raise UserError(f"{path} is no image that can be scored: {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, _LARGEST_IMAGE)
    except OSError as error:
        raise os_error(error, f"read {path}") from None
