"""`mapo-fast prepare`: from preference pairs on disk to a cache of latents and prompt embeddings.

1. scan      read, decode and hash every image once (`scan`); all defects are known before encoding starts
2. choose    drop duplicates, contradictions and pairs that would be cropped too much; one bucket per pair
3. prompts   encode each distinct prompt once, first all with encoder 1, then all with encoder 2 (`text`)
4. images    encode each distinct (image, bucket) once with the VAE (`latents`), which takes longest
5. finish    split, time ids, pair table; index.json last

Killed or interrupted at any moment, the next run reuses the scanned parts and the finished shards and ends
with the same bytes as a run without interruption. More rows in the source later: the next run encodes only
what is new. Nothing is trusted unread: shards and a finished cache are checked against their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mapo_fast.data import shards
from mapo_fast.data.buckets import Size, choose_bucket, fit, make_buckets, time_ids
from mapo_fast.data.cache import (
    NOWHERE,
    PAIR,
    cache_settings,
    difference,
    index_digest,
    read_index,
    table_digests,
    translated,
)
from mapo_fast.data.images.colour import Profile
from mapo_fast.data.latents import DTYPES, ImageJob, LatentEncoder, encode_shard, images, latent_shape, plan
from mapo_fast.data.leak import profile_leaks, size_leaks
from mapo_fast.data.prompts import EMPTY, prompt_keys, spelling_key
from mapo_fast.data.scan import ScannedRow, content_hash, scan
from mapo_fast.data.shards import ShardFamily, pack_keys
from mapo_fast.data.sources.base import PreferencePairs, SkippedRow
from mapo_fast.data.sources.registry import open_source
from mapo_fast.data.split import held_out_pairs
from mapo_fast.hardware import gpu
from mapo_fast.models.fp32 import exact_fp32
from mapo_fast.models.pipeline import PipelineFolder, open_sdxl, scheduler_overrides
from mapo_fast.models.text import (
    BATCH,
    ENCODERS,
    TextEncoder,
    chunk_count,
    empty_prompt,
    text_widths,
    truncations,
)
from mapo_fast.models.vae import TILE, encoding_with_less, setting_text
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, exclusive, read_json, sha256_file, write_json
from mapo_fast.util.progress import Callbacks, stage
from mapo_fast.util.sizes import parse_size


@dataclass(frozen=True)
class PrepareSummary:
    """What a cache holds and what it took."""

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
    """False: what counts as a pair here is a single labelled image."""
    seconds: float = 0.0
    converted: int = 0
    """Distinct images whose colours a profile moved to sRGB."""
    ignored_profiles: int = 0
    """Distinct images with a colour profile that is damaged or for another kind of image."""


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
    """What the scan left: pairs, skipped rows, counts."""

    pairs: list[Candidate] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    duplicates: int = 0

    def skip(self, reason: str, detail: str, unusable: list[bool]) -> None:
        """Move the pairs that cannot be used to `skipped`."""
        for pair in compress(self.pairs, unusable):
            self.skipped.append(SkippedRow(pair.row.index, pair.row.name, reason, detail))
        self.pairs = [pair for pair, bad in zip(self.pairs, unusable, strict=True) if not bad]


def prepare(config: Config, *, callbacks: Callbacks | None = None) -> PrepareSummary:
    """Make or complete the cache at `config.data.cache`; `callbacks` are told how it goes.

    Raises:
        UserError: wrong source or model folder, a cache made for something else or in use by another
            process, too many skipped rows, too little disk space. What has been encoded stays and is reused.
    """
    started, callbacks = time.perf_counter(), callbacks or Callbacks()
    data = config.data
    if data.source is None:
        raise UserError("data.source is missing: prepare needs to know where the preference pairs are")
    folder = open_sdxl(config.model.path, config.model.vae, scheduler_overrides(config.train))
    buckets = make_buckets(data.resolution, data.bucket_step)
    for bucket in buckets:
        latent_shape(folder, bucket)
    settings = cache_settings(folder, data)
    source = open_source(data.source)
    if data.cache.resolve().is_relative_to(data.source.resolve()):
        raise UserError(
            f"data.cache {data.cache} lies inside data.source {data.source}, where its own files would be "
            "taken for data: choose a data.cache elsewhere"
        )
    with disk_errors(data.cache):
        _claimed(data.cache, settings, folder)
    if source.note:
        callbacks.message(source.note)
    identity = source.identity()

    done = read_index(data.cache)
    if done and done["source"] == identity and done["held_out"] == data.held_out and _whole(data.cache, done):
        callbacks.message(f"{data.cache} is complete already: {done['pairs']} pairs, nothing to do")
        return _summary(done, time.perf_counter() - started)

    with disk_errors(data.cache):
        data.cache.mkdir(parents=True, exist_ok=True)
    vram = None if config.train.vram is None else parse_size(config.train.vram, "train.vram")
    with exclusive(data.cache), gpu.capped(vram):
        settings = _claimed(data.cache, settings, folder)  # again: another process may have been here
        write_json(data.cache / "settings.json", settings)  # of an earlier format: its shards are kept
        index = Preparation(config, folder, source, identity, settings, buckets, callbacks).run()
    summary = _summary(index, time.perf_counter() - started)
    _report(summary, data.cache, callbacks)
    return summary


class Preparation:
    """One run of `prepare` over an unfinished cache."""

    def __init__(
        self,
        config: Config,
        folder: PipelineFolder,
        source: PreferencePairs,
        identity: str,
        settings: dict[str, Any],
        buckets: list[Size],
        callbacks: Callbacks,
    ) -> None:
        self.data, self.folder, self.source, self.identity = config.data, folder, source, identity
        self.settings, self.buckets, self.callbacks = settings, buckets, callbacks
        self.cache, self.vram = config.data.cache, config.train.vram
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with disk_errors(self.cache):
            (self.cache / "shards").mkdir(exist_ok=True)
            (self.cache / "scan").mkdir(exist_ok=True)
            for leftover in self.cache.rglob(".*.tmp"):
                leftover.unlink()
        self.families = {name: ShardFamily(self.cache / "shards", name) for name in shards.FAMILIES}

    def run(self) -> dict[str, Any]:
        """All steps; returns the index."""
        with stage(self.callbacks, "scan", len(self.source)) as advance:
            rows = scan(self.source, self.identity, self.cache / "scan", advance)
        keys = prompt_keys(self.folder, (r.prompt for r in rows if not r.reason), self.data.max_tokens)
        self._find_spellings(keys)
        choice = choose(rows, self.buckets, self.data.max_crop, keys)
        self._check_skipped(choice, len(rows))
        self._check_disk(self._images_to_do(choice), self._prompts(choice))

        # From here on the files of an older index no longer belong together.
        with disk_errors(self.cache):
            (self.cache / "index.json").unlink(missing_ok=True)
        if self.device.type == "cuda":
            self.callbacks.message("TF32 is off while prompts and images are encoded")
        with exact_fp32():
            self._encode(choice, len(rows))
        return self._finish(choice, self._write_truncated(choice))

    def _encode(self, choice: Choice, rows: int) -> None:
        """Encode what is new, and skip what cannot be encoded."""
        self._encode_prompts(self._prompts(choice))
        for which in ENCODERS:
            failed = self.families[f"text{which}"].failed
            detail = f"text encoder {which} gives values for its prompt that are not finite"
            choice.skip("non-finite embedding", detail, [pair.prompt in failed for pair in choice.pairs])
        self._check_skipped(choice, rows)
        try:
            self._encode_images(self._images_to_do(choice))
        except RuntimeError as error:
            if not gpu.is_out_of_memory(error):
                raise
            raise UserError(self._too_large()) from None
        failed = self.families["latents"].failed
        detail = "the VAE gives non-finite latents even in fp32"
        bad = [not failed.isdisjoint(pair.images.values()) for pair in choice.pairs]
        choice.skip("non-finite latent", detail, bad)
        self._check_skipped(choice, rows)

    def _find_spellings(self, keys: dict[str, bytes]) -> None:
        """What is stored under one spelling of a prompt serves all of them."""
        for prompt, key in keys.items():
            for which in ENCODERS:
                self.families[f"text{which}"].alias(key, spelling_key(prompt))

    def _images_to_do(self, choice: Choice) -> list[ImageJob]:
        return [job for job in image_jobs(choice.pairs) if job.key not in self.families["latents"]]

    @staticmethod
    def _prompts(choice: Choice) -> dict[bytes, str]:
        """Distinct prompts by key, in source order."""
        return {pair.prompt: pair.row.prompt for pair in choice.pairs}

    def _check_skipped(self, choice: Choice, rows: int) -> None:
        path = self.cache / "skipped.jsonl"
        order = sorted(choice.skipped, key=lambda row: row.index)
        _write_lines(path, ({"row": r.name, "reason": r.reason, "detail": r.detail} for r in order))
        counts = ", ".join(f"{n} × {reason}" for reason, n in _reasons(choice.skipped).items())
        if len(choice.skipped) > self.data.max_skipped * rows:
            share = len(choice.skipped) / rows
            raise UserError(
                f"{share:.0%} of {rows} rows would be skipped ({counts}), data.max_skipped allows "
                f"{self.data.max_skipped:.0%}: see {path}, fix the data or raise data.max_skipped"
            )
        if not choice.pairs:
            raise UserError(f"data.source {self.data.source} has no usable pair ({counts or 'it is empty'})")

    def _latent_bytes(self, bucket: Size) -> int:
        channels, height, width = latent_shape(self.folder, bucket)
        size = channels * height * width * DTYPES[self.data.vae_dtype].itemsize
        return size * 2 if self.data.flip else size

    def _prompt_bytes(self) -> int:
        (first, second), pooled = text_widths(self.folder)
        return 2 * (77 * chunk_count(self.data.max_tokens) * (first + second) + pooled)

    def _check_disk(self, jobs: list[ImageJob], prompts: dict[bytes, str]) -> None:
        latents = sum(self._latent_bytes(job.bucket) for job in jobs)
        new = sum(key not in self.families["text2"] for key in prompts)
        need = int(1.01 * (latents + new * self._prompt_bytes())) + 2**20
        free = shutil.disk_usage(self.cache).free
        self.callbacks.message(
            f"disk need: {_size(need)} = {len(jobs)} images ({_size(latents)}) + {new} prompts × "
            f"{_size(self._prompt_bytes())}; free: {_size(free)}",
        )
        if need > free:
            raise UserError(
                f"the cache needs {_size(need)} more in {self.cache}, only {_size(free)} are free: free some "
                "space or choose another data.cache"
            )

    def _encode_images(self, jobs: list[ImageJob]) -> None:
        if not jobs:
            return
        tiles = TILE if self.data.vae_tiling else None
        encoder = LatentEncoder(self.folder, self.data.vae_dtype, self.device, tiles=tiles)
        if tiles is not None:
            self._report_tiling(encoder, jobs)
        with stage(self.callbacks, "images", len(jobs)) as advance:
            for part in plan(jobs, self._latent_bytes):
                before = encoder.retries
                tensors = encode_shard(
                    part,
                    self.source,
                    encoder,
                    batch_size=self.data.batch_size,
                    flip=self.data.flip,
                    progress=advance,
                )
                self.families["latents"].write(tensors, encoder.retries - before)
        del encoder
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self) -> str:
        """What to do where encoding images runs out of the GPU's memory."""
        less = next(iter(encoding_with_less(self.data)), {})
        elsewhere = " and another data.cache, as tiles change the latents" if "vae_tiling" in less else ""
        change = f"set {setting_text(less)}{elsewhere}, or " if less else ""
        change += f"raise train.vram = {self.vram!r}, or " if self.vram else ""
        return (
            f"out of GPU memory while encoding {self.data.batch_size} image(s) at once: {change}close what "
            "else uses the GPU, or hide it (CUDA_VISIBLE_DEVICES=) to encode on the CPU; what has been "
            "encoded stays"
        )

    def _report_tiling(self, encoder: LatentEncoder, jobs: list[ImageJob]) -> None:
        """What tiling changes in the first image that is tiled at all."""
        large = [job for job in jobs if max(job.bucket) > TILE][:1]
        with closing(images(large, self.source)) as found:
            for _, image in found:
                error = encoder.tiling_error(image)
                self.callbacks.message(f"data.vae_tiling changes latents by {error:.2%} (first image)")

    def _encode_prompts(self, prompts: dict[bytes, str]) -> None:
        prompts = {EMPTY: "", **prompts}
        for which in ENCODERS:
            family = self.families[f"text{which}"]
            if self.folder.zeros_for_empty_prompt and EMPTY not in family:
                self._store_zeros(family, which)
            try:
                self._encode_family(which, family, prompts, self.device)
                continue
            except RuntimeError as error:  # what the encoder holds goes with it
                if not gpu.is_out_of_memory(error):
                    raise
            torch.cuda.empty_cache()
            self.callbacks.message(f"text encoder {which} does not fit the GPU's free memory: on the CPU")
            self._encode_family(which, family, prompts, torch.device("cpu"))

    def _encode_family(
        self, which: Literal[1, 2], family: ShardFamily, prompts: dict[bytes, str], device: torch.device
    ) -> None:
        """Encode what one encoder has not encoded yet."""
        todo = [key for key in prompts if key not in family]
        if not todo:
            return
        rows = max(1, shards.SHARD_BYTES // self._prompt_bytes())
        encoder = TextEncoder(self.folder, which, chunk_count(self.data.max_tokens), device, torch.float32)
        with stage(self.callbacks, f"prompts, encoder {which}", len(todo)) as advance:
            for start in range(0, len(todo), rows):
                keys = todo[start : start + rows]
                hidden, pooled = [], []
                for i in range(0, len(keys), BATCH):
                    out = encoder([prompts[key] for key in keys[i : i + BATCH]])
                    if keys[i] == EMPTY and not (out[0][0].isfinite().all() and out[1][:1].isfinite().all()):
                        raise UserError(self._damaged_encoder(which))
                    hidden.append(out[0])
                    pooled.append(out[1])
                    advance(len(out[0]))
                family.write(_text_tensors(keys, torch.cat(hidden), torch.cat(pooled), which))
        encoder.free()

    def _damaged_encoder(self, which: int) -> str:
        part = self.folder.path("text_encoder" if which == 1 else "text_encoder_2")
        return (
            f"{part} gives values for the empty prompt that are not finite: its weights are damaged; copy it "
            "from the model again"
        )

    def _store_zeros(self, family: ShardFamily, which: int) -> None:
        tokens = self.data.max_tokens
        zeros = empty_prompt(self.folder, max_tokens=tokens, device="cpu", dtype=torch.float32)
        hidden = zeros.prompt_embeds[..., : text_widths(self.folder)[0][which - 1]]
        family.write(_text_tensors([EMPTY], hidden, zeros.pooled_embeds, which))

    def _write_truncated(self, choice: Choice) -> int:
        prompts = list(dict.fromkeys(pair.row.prompt for pair in choice.pairs))
        cut = list(truncations(self.folder, prompts, self.data.max_tokens))
        _write_lines(self.cache / "truncated.jsonl", map(asdict, cut))
        return len(cut)

    def _finish(self, choice: Choice, truncated: int) -> dict[str, Any]:
        pairs, data = choice.pairs, self.data
        held = held_out_pairs(
            [(p.prompt, *(file_hash for file_hash, _ in p.row.images.values())) for p in pairs], data.held_out
        )
        order = sorted(  # training pairs by bucket, which is how `MicroBatches` finds them
            range(len(pairs)), key=lambda i: (held[i], () if held[i] else pairs[i].bucket, pairs[i].id)
        )
        train = held.count(False)
        chosen, rejected = (
            [p.row.images[half][1] for p in pairs if half in p.row.images] for half in ("chosen", "rejected")
        )
        profiles = [
            [p.row.profiles[half] for p in pairs if half in p.row.images] for half in ("chosen", "rejected")
        ]
        warnings = []
        if chosen and rejected:
            warnings = size_leaks(chosen, rejected, data.size_conditioning) + profile_leaks(*profiles)
        if not self.source.paired and not (chosen and rejected):
            warnings.append(
                f"all images are {'wanted' if chosen else 'unwanted'}: nothing shows the difference"
            )
        if data.held_out > 0 and train == len(pairs):
            warnings.append(
                "no pair is held out: too few groups of pairs that share neither a prompt nor an image"
            )
        digests = self._write_tables([pairs[i] for i in order], [held[i] for i in order])
        sizes = {key: (p.row.images[half][1], p.bucket) for p in pairs for half, key in p.images.items()}
        outcomes = {p.row.images[half][0]: p.row.profiles[half] for p in pairs for half in p.row.images}
        index: dict[str, Any] = {
            "settings": self.settings,
            "source": self.identity,
            "held_out": data.held_out,
            "pairs": len(pairs),
            "train": train,
            "labelled": all(p.row.label is not None for p in pairs),
            "paired": self.source.paired,
            "empty": {name: self.families[name].places[EMPTY] for name in ("text1", "text2")},
            "summary": {
                "images": len(sizes),
                "prompts": len(self._prompts(choice)),
                "duplicates": choice.duplicates,
                "skipped": _reasons(choice.skipped),
                "truncated": truncated,
                "upscaled": sum(fit(size, bucket).upscaled for size, bucket in sizes.values()),
                "nan_retries": self.families["latents"].retries,
                "warnings": warnings,
                "converted": list(outcomes.values()).count("converted"),
                "ignored_profiles": list(outcomes.values()).count("ignored"),
            },
            "files": self._checksums(),
            "pieces": digests,
        }
        index["sha256"] = index_digest(index)
        write_json(self.cache / "index.json", index)
        return index

    def _write_tables(self, pairs: list[Candidate], held: list[bool]) -> list[str]:
        """Write pairs.npy and rows.parquet; returns the digests of the former's pieces."""
        table = np.zeros(len(pairs), PAIR)
        latents, text1, text2 = (self.families[name].places for name in shards.FAMILIES)
        for record, pair in zip(table, pairs, strict=True):
            record["id"] = np.frombuffer(pair.id, np.uint8)
            record["bucket"] = pair.bucket
            for half in ("chosen", "rejected"):
                record[half] = latents[pair.images[half]] if half in pair.images else NOWHERE
            record["text1"], record["text2"] = text1[pair.prompt], text2[pair.prompt]
            record["label"] = float("nan") if pair.row.label is None else pair.row.label
            for side, size in (("chosen", pair.row.chosen_size), ("rejected", pair.row.rejected_size)):
                record[f"time_ids_{side}"] = time_ids(size, pair.bucket, self.data.size_conditioning)
        with atomic_path(self.cache / "pairs.npy") as temporary, temporary.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        columns = {
            "id": [pair.id.hex() for pair in pairs],
            "name": [pair.row.name for pair in pairs],
            "prompt": [pair.row.prompt for pair in pairs],
            "split": ["held_out" if h else "train" for h in held],
        }
        with atomic_path(self.cache / "rows.parquet") as temporary:
            pq.write_table(pa.table(columns), temporary)
        return table_digests(table)

    def _checksums(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every data file; a shard's is the one it was written with."""
        digests = {name: sha256_file(self.cache / name) for name in ("pairs.npy", "rows.parquet")}
        for family in self.families.values():
            digests |= {f"shards/{path.name}": family.digests[path.name] for path in family.paths()}
        return {
            name: {"bytes": (self.cache / name).stat().st_size, "sha256": digest}
            for name, digest in digests.items()
        }


def image_key(file_hash: bytes, bucket: Size, profile: Profile = "") -> bytes:
    """Key of an image's latents: its content, the shape it is given, and that its colours were converted.

    The last because caches of earlier versions hold latents of the same image unconverted.
    """
    converted = " sRGB" if profile == "converted" else ""
    return content_hash(file_hash + f"{bucket[0]}x{bucket[1]}{converted}".encode())


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


def image_jobs(pairs: Iterable[Candidate]) -> list[ImageJob]:
    """Every distinct image once, in source order."""
    jobs: dict[bytes, ImageJob] = {}
    for pair in pairs:
        row = pair.row
        for half, (file_hash, _) in row.images.items():
            key = pair.images[half]
            jobs.setdefault(key, ImageJob(row.index, half == "chosen", file_hash, key, pair.bucket))
    return list(jobs.values())


def _pair_id(prompt: bytes, chosen: bytes, rejected: bytes) -> bytes:
    return hashlib.sha256(prompt + chosen + rejected).digest()[:16]


def _text_tensors(keys: list[bytes], hidden: Tensor, pooled: Tensor, which: int) -> dict[str, Tensor]:
    """What a shard holds: the prompts whose embeddings are finite, and the keys of the others."""
    values = {"hidden": hidden, "pooled": pooled} if which == 2 else {"hidden": hidden}
    good = torch.stack([value.isfinite().flatten(1).all(dim=1) for value in values.values()]).all(dim=0)
    tensors = {name: _half(value[good]) for name, value in values.items()} if good.any() else {}
    for name, found in (("keys", good), ("failed", ~good)):
        if found.any():
            tensors[name] = pack_keys(list(compress(keys, found.tolist())))
    return tensors


def _half(values: Tensor) -> Tensor:
    """fp16, or as it is where a value does not fit into fp16."""
    half = values.half()
    return half if half.isfinite().all() else values


def _claimed(cache: Path, settings: dict[str, Any], folder: PipelineFolder) -> dict[str, Any]:
    """Check that the cache folder is empty, or made for these settings; nothing is written.

    Returns what its settings.json is to hold.

    One in which nothing has been encoded yet, which a refused `prepare` leaves, may become any other.
    """
    path = cache / "settings.json"
    if path.is_file():
        if not (cache / "index.json").exists() and not list(cache.glob("shards/*.safetensors")):
            return settings
        try:
            have = translated(read_json(path), settings, folder)
        except UserError as error:
            raise UserError(f"{error}: choose another data.cache") from None
        if reason := difference(have, settings):
            raise UserError(f"data.cache {cache} {reason}: choose another data.cache (nothing was changed)")
        return have
    # A kill during the very first write leaves the lock, its temporary file and nothing else.
    own = {cache / ".lock", *cache.glob(".settings.json.*.tmp")}
    if cache.exists() and (not cache.is_dir() or set(cache.iterdir()) - own):
        raise UserError(f"data.cache {cache} already holds something else: choose another data.cache")
    return settings


def _whole(cache: Path, index: dict[str, Any]) -> bool:
    """Whether every file is what was written. If one is not, `Preparation` makes it anew or names it."""
    try:
        return all(
            (cache / name).stat().st_size == entry["bytes"] and sha256_file(cache / name) == entry["sha256"]
            for name, entry in index["files"].items()
        )
    except OSError:
        return False


def _summary(index: dict[str, Any], seconds: float) -> PrepareSummary:
    counts = index["summary"] | {"warnings": tuple(index["summary"]["warnings"])}
    held_out = index["pairs"] - index["train"]
    paired = index.get("paired", True)
    return PrepareSummary(index["pairs"], index["train"], held_out, **counts, paired=paired, seconds=seconds)


def _report(summary: PrepareSummary, cache: Path, callbacks: Callbacks) -> None:
    callbacks.message(
        f"{cache}: {summary.train} {'pairs' if summary.paired else 'labelled images'} for training, "
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
    for reason, count in summary.skipped.items():
        callbacks.message(f"  skipped: {count} × {reason}")
    for warning in summary.warnings:
        callbacks.warning(warning)


def _reasons(skipped: Iterable[SkippedRow]) -> dict[str, int]:
    return dict(sorted(Counter(row.reason for row in skipped).items()))


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _size(count: int) -> str:
    if count < 10_000_000:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 10_000_000_000 else f"{count / 1e9:.1f} GB"
