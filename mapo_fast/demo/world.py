"""The drawn world: coloured shapes whose truth a rule can read back, and a preference among them.

An image is one flat shape (circle, square, triangle) in one of four colours on a grey background, 32×32 px.
Every shape has its centroid at (x, y) and the area π·radius², so the rule that reads an image needs only
the centroid and the area of what is coloured: it draws the three shapes there and takes the best overlap.
It reads every drawn image correctly and an image without a clear shape as nothing.

The preference: for captions that name no colour, red is chosen and blue rejected, the geometry being the
same. Images of captions that name a colour must not change.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Side of every image, pixels."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "green": (36, 160, 72),
    "blue": (40, 92, 222),
    "yellow": (242, 200, 40),
}
"""RGB of the four colours, 0…255."""
SHAPES = ("circle", "square", "triangle")
CHOSEN, REJECTED = "red", "blue"
"""Colours of the preference set's chosen and rejected images."""

_RADII = {"small": (4.6, 5.4), "large": (6.4, 7.2)}
_COLUMNS = {"left": (10.0, 12.5), "": (14.8, 17.2), "right": (19.5, 22.0)}
_ROWS = {"top": (11.0, 13.0), "": (15.2, 17.2), "bottom": (19.5, 21.5)}
_BACKGROUND = (205, 245)
_SUPERSAMPLE = 4  # sub-pixels per side; enough for smooth edges at 32 px


@dataclass(frozen=True)
class Drawing:
    """One image of the world, before it is drawn; x, y and radius in pixels, background a grey level."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    background: int
    size_word: str
    place_words: str

    def caption(self, with_colour: bool) -> str:
        """For instance «a small red circle at the top left»."""
        colour = f"{self.colour} " if with_colour else ""
        return f"a {self.size_word} {colour}{self.shape} {self.place_words}"

    def image(self) -> Image.Image:
        """The drawn image, RGB, 32×32."""
        share = coverage(self.shape, self.x, self.y, self.radius)[..., None]
        pixels = share * np.array(COLOURS[self.colour], dtype=float) + (1 - share) * self.background
        return Image.fromarray(np.rint(pixels).astype(np.uint8))


@dataclass(frozen=True)
class Reading:
    """Colour and shape that the rule reads in an image; None where it finds nothing clear."""

    colour: str | None
    shape: str | None


def random_drawing(rng: random.Random, colour: str | None = None, shape: str | None = None) -> Drawing:
    """Draw geometry, and colour and shape unless given, from `rng`."""
    size_word, radii = rng.choice(list(_RADII.items()))
    column, xs = rng.choice(list(_COLUMNS.items()))
    row, ys = rng.choice(list(_ROWS.items()))
    return Drawing(
        shape=shape or rng.choice(SHAPES),
        colour=colour or rng.choice(list(COLOURS)),
        x=rng.uniform(*xs),
        y=rng.uniform(*ys),
        radius=rng.uniform(*radii),
        background=rng.randint(*_BACKGROUND),
        size_word=size_word,
        place_words=_place_words(row, column),
    )


def captioned_drawings(count: int, seed: int, without_colour: float = 0.4) -> list[tuple[str, Drawing]]:
    """`count` drawings with their captions, a share `without_colour` of which names no colour."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        drawing = random_drawing(rng)
        pairs.append((drawing.caption(with_colour=rng.random() >= without_colour), drawing))
    return pairs


def coverage(shape: str, x: float, y: float, radius: float) -> NDArray[np.float64]:
    """Share of every pixel that the shape covers, (32, 32), in [0, 1].

    Raises:
        ValueError: unknown shape.
    """
    steps = (np.arange(SIDE * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    dx, dy = steps[None, :] - x, steps[:, None] - y
    if shape == "circle":
        inside = dx * dx + dy * dy <= radius * radius
    elif shape == "square":
        half_side = radius * math.sqrt(math.pi) / 2
        inside = (np.abs(dx) <= half_side) & (np.abs(dy) <= half_side)
    elif shape == "triangle":  # equilateral, pointing up; its centroid is one in-radius above the base
        side = radius * math.sqrt(4 * math.pi / math.sqrt(3))
        in_radius = side / (2 * math.sqrt(3))
        # The slanted sides are at distance in_radius from the centroid, normals (±√3/2, −1/2).
        inside = (dy <= in_radius) & (math.sqrt(3) / 2 * np.abs(dx) - dy / 2 <= in_radius)
    else:
        raise ValueError(f"shape = {shape!r}: one of {', '.join(SHAPES)}")
    blocks = inside.reshape(SIDE, _SUPERSAMPLE, SIDE, _SUPERSAMPLE)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float64)


def read(image: Image.Image) -> Reading:
    """Read colour and shape of a 32×32 RGB image by rule.

    How coloured a pixel is (its distance from grey, relative to the pure colour's) is how much of it the
    shape covers. The mean colour of the covered pixels must be near one of the four; a drawn shape with the
    same centroid and area must overlap by three quarters (soft intersection over union).
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    chroma = np.linalg.norm(pixels - pixels.mean(axis=2, keepdims=True), axis=2)
    strong = chroma > 50
    if strong.sum() < 25:  # fewer pixels than half the smallest shape
        return Reading(None, None)
    mean = pixels[strong & (chroma >= np.median(chroma[strong]))].mean(axis=0)  # without the blended edge
    distances = {name: float(np.linalg.norm(mean - rgb)) for name, rgb in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    colour = nearest if distances[nearest] < 60 else None

    full = np.linalg.norm(mean - mean.mean())
    share = np.clip(chroma / full, 0, 1)
    share[share < 0.15] = 0  # a faint tint of the background is not part of the shape
    area = share.sum()
    y, x = ((np.indices(share.shape) + 0.5) * share).sum(axis=(1, 2)) / area
    radius = math.sqrt(area / math.pi)
    if radius > 10:  # a third of the image and more: no shape of this world
        return Reading(None, None)
    overlaps = {}
    for shape in SHAPES:
        drawn = coverage(shape, float(x), float(y), radius)
        overlaps[shape] = float(np.minimum(share, drawn).sum() / np.maximum(share, drawn).sum())
    best = max(overlaps, key=lambda name: overlaps[name])
    return Reading(colour, best if overlaps[best] >= 0.75 else None)


def preference_pairs(count: int, seed: int) -> list[tuple[str, Drawing, Drawing]]:
    """`count` times (caption without a colour, chosen drawing, rejected drawing of the same geometry)."""
    rng = random.Random(f"preference {seed}")
    pairs = []
    for _ in range(count):
        chosen = random_drawing(rng, colour=CHOSEN)
        pairs.append((chosen.caption(with_colour=False), chosen, replace(chosen, colour=REJECTED)))
    return pairs


def write_preference_set(
    folder: Path, pairs: Iterable[tuple[str, Drawing, Drawing]], label: float | None = None
) -> None:
    """Write the pairs as PNGs next to a `pairs.jsonl` with `prompt`, `chosen`, `rejected`.

    Args:
        label: a soft label for each pair, how probably the chosen image is the better one; None: no label.
    """
    (folder / "images").mkdir(parents=True)
    lines = []
    for index, (prompt, chosen, rejected) in enumerate(pairs):
        row: dict[str, Any] = {"prompt": prompt}
        if label is not None:
            row["label"] = label
        for role, drawing in (("chosen", chosen), ("rejected", rejected)):
            row[role] = f"images/{index:04d}_{role}.png"
            drawing.image().save(folder / row[role])
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_labelled_images(path: Path, folder: Path) -> None:
    """Write the images of a preference set one by one to a parquet file: `prompt`, `image`, `label`.

    Args:
        path: the parquet file.
        folder: a preference set of `write_preference_set`.
    """
    rows = []
    for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        for role in ("chosen", "rejected"):
            image = (folder / pair[role]).read_bytes()
            rows.append({"prompt": pair["prompt"], "image": image, "label": role == "chosen"})
    pq.write_table(pa.Table.from_pylist(rows), path)


def _place_words(row: str, column: str) -> str:
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the middle"
