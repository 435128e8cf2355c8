"""From encoded pairs to a finished cache: split, pair table, index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mapo_fast.data.buckets import crop_to, time_ids
from mapo_fast.data.choose import Candidate, Choice
from mapo_fast.data.index import write_index
from mapo_fast.data.leak import colour_leaks, made_leaks, profile_leaks, size_leaks
from mapo_fast.data.prompts import EMPTY
from mapo_fast.data.shards import FAMILIES, ShardFamily
from mapo_fast.data.split import held_out_pairs
from mapo_fast.data.summary import reasons, write_lines
from mapo_fast.data.table import NOWHERE, PAIR, table_digests
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.text import truncations
from mapo_fast.settings.schema import DataConfig
from mapo_fast.util.files import atomic_path, sha256_file


def finish(
    data: DataConfig,
    choice: Choice,
    families: Mapping[str, ShardFamily],
    folder: Pipeline,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything but the shards; returns the index, which is written last.

    Args:
        data: the settings.
        choice: the pairs, all of them encoded.
        families: the shards.
        folder: the pipeline.
        known: the index's `settings`, `source` (its identity) and `paired` (whether rows are pairs).
    """
    pairs = choice.pairs
    held = held_out_pairs(
        [(p.prompt, *(file_hash for file_hash, _ in p.row.images.values())) for p in pairs], data.held_out
    )
    order = sorted(  # training pairs by bucket, which is how `MicroBatches` finds them
        range(len(pairs)), key=lambda i: (held[i], () if held[i] else pairs[i].bucket, pairs[i].id)
    )
    cut = list(truncations(folder, list(dict.fromkeys(pair.row.prompt for pair in pairs)), data.max_tokens))
    write_lines(data.cache / "truncated.jsonl", map(asdict, cut))
    pieces = _write_tables(data, [pairs[i] for i in order], [held[i] for i in order], families)
    sizes = {key: (p.row.images[half][1], p.bucket) for p in pairs for half, key in p.images.items()}
    profiles = {p.row.images[half][0]: p.row.profiles[half] for p in pairs for half in p.row.images}
    outcomes = list(profiles.values())
    return write_index(
        data.cache,
        {
            "settings": known["settings"],
            "source": known["source"],
            "held_out": data.held_out,
            "pairs": len(pairs),
            "train": held.count(False),
            "labelled": all(p.row.label is not None for p in pairs),
            "paired": known["paired"],
            "empty": {name: families[name].places[EMPTY] for name in ("text1", "text2")},
            "summary": {
                "images": len(sizes),
                "prompts": len(choice.prompts),
                "duplicates": choice.duplicates,
                "skipped": reasons(choice.skipped),
                "truncated": len(cut),
                "upscaled": sum(crop_to(size, bucket).upscaled for size, bucket in sizes.values()),
                "nan_retries": families["latents"].retries,
                "warnings": _warnings(data, pairs, held, known["paired"]),
                "converted": outcomes.count("converted"),
                "ignored_profiles": outcomes.count("ignored"),
            },
            "files": _checksums(data.cache, families),
            "pieces": pieces,
        },
    )


def _warnings(data: DataConfig, pairs: list[Candidate], held: list[bool], paired: bool) -> list[str]:
    """Warnings about what gives the preference away, and what cannot be learned or measured."""
    rows = [pair.row for pair in pairs]
    chosen, rejected = (
        [row.images[half][1] for row in rows if half in row.images] for half in ("chosen", "rejected")
    )
    halves = [(row, half) for half in ("chosen", "rejected") for row in rows if half in row.images]
    warnings = []
    if chosen and rejected:
        at = len(chosen)
        profiles, made, colours = (
            [getattr(row, name)[half] for row, half in halves] for name in ("profiles", "made", "colours")
        )
        warnings = [
            *size_leaks(chosen, rejected, data.size_conditioning),
            *profile_leaks(profiles[:at], profiles[at:]),
            *made_leaks(made[:at], made[at:]),
            *colour_leaks(colours[:at], colours[at:]),
        ]
    if not paired and not (chosen and rejected):
        warnings.append(f"all images are {'wanted' if chosen else 'unwanted'}: nothing shows the difference")
    if data.held_out > 0 and not any(held):
        warnings.append(
            "no pair is held out: too few groups of pairs that share neither a prompt nor an image"
        )
    return warnings


def _write_tables(
    data: DataConfig, pairs: list[Candidate], held: list[bool], families: Mapping[str, ShardFamily]
) -> list[str]:
    """Write pairs.npy and rows.parquet; returns the digests of the former's pieces."""
    table = np.zeros(len(pairs), PAIR)
    latents, text1, text2 = (families[name].places for name in FAMILIES)
    for record, pair in zip(table, pairs, strict=True):
        record["id"] = np.frombuffer(pair.id, np.uint8)
        record["bucket"] = pair.bucket
        for half in ("chosen", "rejected"):
            record[half] = latents[pair.images[half]] if half in pair.images else NOWHERE
        record["text1"], record["text2"] = text1[pair.prompt], text2[pair.prompt]
        record["label"] = float("nan") if pair.row.label is None else pair.row.label
        for side, size in (("chosen", pair.row.chosen_size), ("rejected", pair.row.rejected_size)):
            record[f"time_ids_{side}"] = time_ids(size, pair.bucket, data.size_conditioning)
    with atomic_path(data.cache / "pairs.npy") as temporary, temporary.open("wb") as file:
        np.save(file, table, allow_pickle=False)
    columns = {
        "id": [pair.id.hex() for pair in pairs],
        "name": [pair.row.name for pair in pairs],
        "prompt": [pair.row.prompt for pair in pairs],
        "split": ["held_out" if h else "train" for h in held],
    }
    with atomic_path(data.cache / "rows.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)
    return table_digests(table)


def _checksums(cache: Path, families: Mapping[str, ShardFamily]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every data file; a shard's is the one it was written with."""
    digests = {name: sha256_file(cache / name) for name in ("pairs.npy", "rows.parquet")}
    for family in families.values():
        digests |= {f"shards/{path.name}": family.digests[path.name] for path in family.paths()}
    return {
        name: {"bytes": (cache / name).stat().st_size, "sha256": digest} for name, digest in digests.items()
    }
