"""Which rows become pairs, and the shape that each pair's images get.

Duplicates, contradictions and pairs that would be cropped too much are left out; every distinct prompt and
image of the rest is named once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from mapo_fast.data.buckets import Size, choose_bucket
from mapo_fast.data.images.colour import Profile
from mapo_fast.data.scan import ScannedRow, content_hash
from mapo_fast.data.sources.base import SkippedRow


@dataclass(frozen=True)
class ImageJob:
    """One distinct image to encode: its first place in the source, and the shape it gets."""

    row: int
    chosen: bool
    file_hash: bytes
    key: bytes
    bucket: Size


@dataclass(frozen=True)
class Candidate:
    """A usable pair with its bucket, or a single image."""

    row: ScannedRow
    id: bytes
    bucket: Size
    prompt: bytes
    images: dict[str, bytes]
    """Key of the latents of each half that there is, `chosen` and `rejected`."""


@dataclass
class Choice:
    """Result of the choice: pairs, skipped rows, counts."""

    pairs: list[Candidate] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    duplicates: int = 0

    @property
    def prompts(self) -> dict[bytes, str]:
        """Distinct prompts by key, in source order."""
        return {pair.prompt: pair.row.prompt for pair in self.pairs}

    @property
    def images(self) -> list[ImageJob]:
        """Every distinct image once, in source order."""
        jobs: dict[bytes, ImageJob] = {}
        for pair in self.pairs:
            row = pair.row
            for half, (file_hash, _) in row.images.items():
                key = pair.images[half]
                jobs.setdefault(key, ImageJob(row.index, half == "chosen", file_hash, key, pair.bucket))
        return list(jobs.values())

    def skip(self, reason: str, detail: str, unusable: list[bool]) -> None:
        """Move the pairs that cannot be used to `skipped`."""
        for pair in compress(self.pairs, unusable):
            self.skipped.append(SkippedRow(pair.row.index, pair.row.name, reason, detail))
        self.pairs = [pair for pair, bad in zip(self.pairs, unusable, strict=True) if not bad]


def choose(
    rows: Iterable[ScannedRow], buckets: list[Size], max_crop: float, prompts: Mapping[str, bytes]
) -> Choice:
    """Keep each usable pair once and give it its bucket.

    Prompts are the same where `prompts` gives them the same key.

    A row that repeats a pair is counted as a duplicate. Rows that contradict each other (same prompt, same
    images, the other one chosen; or a single image that is wanted here and unwanted there) are all skipped:
    together they say nothing.
    """
    choice = Choice()
    by_id: dict[bytes, ScannedRow] = {}
    for row in rows:
        if row.reason:
            choice.skipped.append(SkippedRow(row.index, row.name, row.reason, row.detail))
            continue
        pair_id = _pair_id(prompts[row.prompt], row.chosen_hash, row.rejected_hash)
        if by_id.setdefault(pair_id, row) is not row:
            choice.duplicates += 1
    cropped: dict[tuple[Size, Size], Any] = {}
    for pair_id, row in by_id.items():
        other = by_id.get(_pair_id(prompts[row.prompt], row.rejected_hash, row.chosen_hash))
        if other is not None:
            single = len(row.images) == 1
            detail = f"{other.name} {'labels it otherwise' if single else 'chooses the other image'} for the"
            detail += " same prompt"
            choice.skipped.append(SkippedRow(row.index, row.name, "contradiction", detail))
            continue
        sizes = (row.chosen_size, row.rejected_size)
        if sizes not in cropped:
            cropped[sizes] = choose_bucket(*sizes, buckets)
        best = cropped[sizes]
        if best.crop > max_crop:
            detail = f"the best bucket cuts off {best.crop:.2f} of an image, data.max_crop = {max_crop}"
            choice.skipped.append(SkippedRow(row.index, row.name, "too much crop", detail))
            continue
        keys = {
            half: image_key(file_hash, best.bucket, row.profiles[half])
            for half, (file_hash, _) in row.images.items()
        }
        choice.pairs.append(Candidate(row, pair_id, best.bucket, prompts[row.prompt], keys))
    return choice


def image_key(file_hash: bytes, bucket: Size, profile: Profile = "") -> bytes:
    """Key of an image's latents: its content, the shape it is given, and that its colours were converted.

    The last because caches of earlier versions hold latents of the same image unconverted.
    """
    converted = " sRGB" if profile == "converted" else ""
    return content_hash(file_hash + f"{bucket[0]}x{bucket[1]}{converted}".encode())


def _pair_id(prompt: bytes, chosen: bytes, rejected: bytes) -> bytes:
    return hashlib.sha256(prompt + chosen + rejected).digest()[:16]
