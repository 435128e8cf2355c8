"""Output of `prepare`: lists of skipped rows and of cut prompts, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapo_fast.data.sources.base import SkippedRow
from mapo_fast.util.files import atomic_path, parse_json, read_bytes
from mapo_fast.util.progress import Callbacks


@dataclass(frozen=True)
class PrepareResult:
    """Contents of a cache, and the effort to make it."""

    cache: Path
    """The cache's folder; `skipped.jsonl` there lists the skipped rows, `truncated.jsonl` cut prompts."""
    pairs: int
    train: int
    held_out: int
    images: int
    """Distinct images; one that is used in two buckets counts twice."""
    prompts: int
    """Distinct prompts, the empty prompt not counted."""
    duplicates: int
    """Rows that repeat a pair."""
    skipped: dict[str, int]
    """Rows left out, per reason."""
    truncated: int
    """Prompts that lost text."""
    upscaled: int
    """Distinct images that were smaller than their bucket."""
    nan_retries: int
    """Latents encoded again in fp32 because they came out non-finite."""
    warnings: tuple[str, ...]
    paired: bool = True
    """Whether rows are pairs; False if each is a single labelled image."""
    seconds: float = 0.0
    encoded: int = 0
    """Images that this call encoded; the others were there already."""
    converted: int = 0
    """Distinct images whose colours a profile moved to sRGB."""
    ignored_profiles: int = 0
    """Distinct images with a colour profile that is damaged or for another kind of image."""


SKIPPED = "skipped.jsonl"
"""The file in a cache that lists the skipped rows."""
_LONGEST_LIST = 2**28


_REMEDIES = {
    "too much crop": "crop the two images of a pair to one shape, raise data.max_crop, or choose another "
    "data.resolution or data.bucket_step",
    "missing caption": "write captions next to the images, or set data.default_caption",
    "non-finite embedding": "where it is most rows, the model's text encoders are damaged: copy the model's "
    "files again",
    "non-finite latent": "where it is most rows, the model's VAE is damaged: copy the model's files again, "
    "or name another VAE as model.vae",
    "no prompt in the file": 'give pairs equal names instead of data.pair_by = "prompt"',
}
"""Reason for skipped rows → remedy."""


def remedy(reason: str) -> str:
    """The remedy for rows that are skipped for a reason, after a colon; empty where none is known."""
    return f": {_REMEDIES[reason]}" if reason in _REMEDIES else ""


def summary_of(cache: Path, index: dict[str, Any], seconds: float, encoded: int = 0) -> PrepareResult:
    """The summary that an index holds, how long it took, and how many images were encoded for it."""
    counts = index["summary"] | {"warnings": tuple(index["summary"]["warnings"])}
    held_out = index["pairs"] - index["train"]
    paired = index.get("paired", True)
    return PrepareResult(
        cache,
        index["pairs"],
        index["train"],
        held_out,
        **counts,
        paired=paired,
        seconds=seconds,
        encoded=encoded,
    )


def report(summary: PrepareResult, callbacks: Callbacks) -> None:
    """Tell the callbacks what the cache holds, what was left out, and what to look at."""
    callbacks.message(
        f"{summary.cache}: {summary.train} {'pairs' if summary.paired else 'labelled images'} for training, "
        f"{summary.held_out} held out; {summary.images} images "
        f"({summary.upscaled} upscaled), {summary.prompts} prompts ({summary.truncated} truncated); "
        f"{summary.duplicates} duplicates, {sum(summary.skipped.values())} skipped, "
        f"{summary.nan_retries} latents encoded again in fp32; {summary.seconds:.0f} s",
    )
    if summary.converted:
        callbacks.message(f"  {summary.converted} images had a colour profile: converted to sRGB")
    if summary.ignored_profiles:
        callbacks.message(
            f"  {summary.ignored_profiles} images have a colour profile that is unusable: ignored"
        )
    first = _first_skipped(summary.cache / SKIPPED) if summary.skipped else {}
    for reason, count in summary.skipped.items():
        such_as = f" (such as {first[reason]})" if reason in first else ""
        callbacks.message(f"  skipped: {count} × {reason}{such_as}{remedy(reason)}")
    for warning in summary.warnings:
        callbacks.warning(warning)


def _first_skipped(path: Path) -> dict[str, str]:
    """Row and detail of the first row that is skipped for each reason."""
    found: dict[str, str] = {}
    try:
        lines = read_bytes(path, _LONGEST_LIST).decode("utf-8", "replace").splitlines()
    except OSError:  # the counts are in the index; somebody may have removed the list
        return found
    for line in lines:
        try:
            row = parse_json(line)
            text = ": ".join(filter(None, (str(row["row"]), str(row["detail"]))))
            found.setdefault(str(row["reason"]), text)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def reasons(skipped: Iterable[SkippedRow]) -> dict[str, int]:
    """Number of skipped rows for each reason."""
    return dict(sorted(Counter(row.reason for row in skipped).items()))


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
