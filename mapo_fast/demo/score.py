"""Sample the drawn world's captions from a model and score the images by rule, with confidence intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from mapo_fast.demo import world
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sample import decode_latents, sample_latents
from mapo_fast.models.text import PromptEmbeds, empty_prompt, encode_prompts

GUIDANCE = 3.0
"""Classifier-free guidance of every sample."""
_BATCH = 64


@dataclass(frozen=True)
class Prompts:
    """Drawings whose captions are sampled: the truth, the captions, their embeddings, one seed each."""

    drawings: list[world.Drawing]
    captions: list[str]
    embeds: PromptEmbeds
    empty: PromptEmbeds
    seeds: list[int]


@dataclass(frozen=True)
class Samples:
    """Images of one model for one set of prompts, with the rule's readings."""

    images: list[Image]
    readings: list[world.Reading]


def make_prompts(folder: Pipeline, *, with_colour: bool, count: int, seed: int, device: Any) -> Prompts:
    """`count` captions with shapes (and colours, where named) in equal shares and random geometry.

    The start seeds are far from those of the training data and equal for every model that is compared.
    """
    rng = random.Random(f"prompts {with_colour} {seed}")
    colours = list(world.COLOURS)
    drawings = [
        world.random_drawing(rng, shape=world.SHAPES[i % 3], colour=colours[i // 3 % 4]) for i in range(count)
    ]
    captions = [drawing.caption(with_colour) for drawing in drawings]
    distinct = sorted(set(captions))
    settings = {"max_tokens": 77, "device": device, "dtype": torch.float32}
    encoded = encode_prompts(folder, distinct, **settings)
    rows = torch.tensor([distinct.index(caption) for caption in captions])
    embeds = PromptEmbeds(encoded.prompt_embeds[rows], encoded.pooled_embeds[rows])
    empty = empty_prompt(folder, **settings)
    seeds = [1_000_000 * (seed + 1) + 500_000 * with_colour + i for i in range(count)]
    return Prompts(drawings, captions, embeds, empty, seeds)


def sample(unet: Any, vae: Any, folder: Pipeline, prompts: Prompts, steps: int) -> Samples:
    """Sample and read one image per prompt."""
    latents = sample_latents(
        unet,
        folder,
        prompts.embeds,
        prompts.empty,
        seeds=prompts.seeds,
        height=world.SIDE,
        width=world.SIDE,
        steps=steps,
        guidance=GUIDANCE,
        batch_size=_BATCH,
    )
    images = decode_latents(vae, latents, batch_size=_BATCH)
    return Samples(images, [world.read(image) for image in images])


def preferred(reading: world.Reading, drawing: world.Drawing) -> bool:
    """Preference prompts: the asked shape in the chosen colour."""
    return reading == world.Reading(world.CHOSEN, drawing.shape)


def correct(reading: world.Reading, drawing: world.Drawing) -> bool:
    """Must-not-change prompts: the asked shape in the asked colour."""
    return reading == world.Reading(drawing.colour, drawing.shape)


def share(
    samples: Samples, prompts: Prompts, rule: Callable[[world.Reading, world.Drawing], bool]
) -> tuple[float, tuple[float, float]]:
    """Share of samples that satisfy the rule, and its 95 % interval."""
    hits = sum(rule(r, d) for r, d in zip(samples.readings, prompts.drawings, strict=True))
    return hits / len(samples.readings), wilson(hits, len(samples.readings))


def colour_shares(readings: Sequence[world.Reading]) -> dict[str, float]:
    """Share of each colour, and of images in which the rule sees none."""
    seen = [reading.colour for reading in readings]
    shares = {colour: seen.count(colour) / len(seen) for colour in world.COLOURS}
    return {**shares, "none": seen.count(None) / len(seen)}


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a binomial share; unlike the normal one it stays right at 0 and 1."""
    p = hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
