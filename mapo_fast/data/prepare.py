"""`mapo-fast prepare`: from preference pairs on disk to a cache of latents and prompt embeddings.

1. source       recognise the layout (`sources.registry`)
2. scan         read, decode and hash every image once; all defects are known before encoding starts
3. choose       drop duplicates, contradictions and pairs that would be cropped too much; one bucket per pair
4. embeddings   encode each distinct prompt once, first all with encoder 1, then all with encoder 2
5. latents      encode each distinct (image, bucket) once with the VAE, which takes longest
6. finish       split, time ids, pair table; index.json last (`index`)

Steps 4 and 5 write shards (`shards`). Killed or interrupted at any moment, the next run reuses the scanned
parts and the finished shards and ends with the same bytes as a run without interruption. More rows in the
source later: the next run encodes only what is new. Other text encoders or tokenizers: only prompts are
encoded again. Nothing is trusted unread: shards and a finished cache are checked against their SHA-256.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mapo_fast.data import shards
from mapo_fast.data.buckets import Size, make_buckets
from mapo_fast.data.choose import Choice, choose
from mapo_fast.data.embeddings import embed_prompts, prompt_bytes
from mapo_fast.data.finish import finish
from mapo_fast.data.given import check_confirmed, given_data
from mapo_fast.data.index import cache_settings, claim, is_whole, read_index
from mapo_fast.data.latents import encode_images, latent_bytes
from mapo_fast.data.prompts import prompt_keys, spelling_key
from mapo_fast.data.scan import ScannedRow, scan
from mapo_fast.data.shards import ShardFamily
from mapo_fast.data.sources.base import PreferencePairs
from mapo_fast.data.summary import (
    SKIPPED,
    PrepareResult,
    reasons,
    remedy,
    report,
    summary_of,
    write_lines,
)
from mapo_fast.data.vae_encoder import latent_shape
from mapo_fast.hardware import gpu
from mapo_fast.models.fp32 import exact_fp32
from mapo_fast.models.open import open_model
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH
from mapo_fast.settings.load import expect_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import disk_errors, exclusive, write_json
from mapo_fast.util.progress import Callbacks, stage
from mapo_fast.util.sizes import parse_size


def prepare(config: Config, *, yes: bool = False, callbacks: Callbacks | None = None) -> PrepareResult:
    """Make or complete the cache at `config.data.cache`.

    Args:
        config: `[model]` and `[data]` matter, and `train.vram` as a limit of GPU memory.
        yes: pairs that only a person can confirm, those of data.pair_by = "order", are right.
        callbacks: called with progress; without them `prepare` is silent.

    Returns:
        The contents of the cache, and the numbers of skipped rows by reason.

    Raises:
        UserError: wrong source or model folder, a cache made for something else or in use by another
            process, too many skipped rows, too little disk space. What has been encoded stays and is reused.
        MachineError: the disk or the memory failed.
    """
    expect_config(config)
    started, callbacks = time.perf_counter(), callbacks or Callbacks()
    data = config.data
    source = given_data(data)
    folder = open_model(config)
    for remark in folder.remarks:
        callbacks.warning(remark)
    buckets = make_buckets(data.resolution, data.bucket_step)
    for bucket in buckets:
        latent_shape(folder, bucket)
    settings = cache_settings(folder, data)
    with disk_errors(data.cache):
        text_stays = claim(data.cache, settings, folder).text_stays
    if source.note:
        callbacks.message(source.note)
    identity = source.identity()

    done = read_index(data.cache)
    same = done and (done["source"], done["held_out"]) == (identity, data.held_out)
    if done and same and text_stays and is_whole(data.cache, done):
        callbacks.message(f"{data.cache} is complete already: {done['pairs']} pairs, nothing to do")
        return summary_of(data.cache, done, time.perf_counter() - started)

    check_confirmed(source, yes=yes)
    if source.to_confirm:
        callbacks.message(source.to_confirm)
    with disk_errors(data.cache):
        data.cache.mkdir(parents=True, exist_ok=True)
    vram = None if config.train.vram is None else parse_size(config.train.vram, "train.vram")
    with exclusive(data.cache), gpu.capped(vram):
        # Checked again: another process may have been here. A cache of an earlier format is taken over by
        # this: its shards stay, and only its tables are written again.
        settings, text_stays = claim(data.cache, settings, folder)
        if not text_stays:
            callbacks.message(
                f"{data.cache} was made with another text encoder or tokenizer: its prompts are encoded "
                "again, its latents stay"
            )
            _remove_text(data.cache)
        write_json(data.cache / "settings.json", settings)
        known = {"settings": settings, "source": identity, "paired": source.paired}
        preparation = Preparation(config, folder, source, buckets, callbacks)
        index = preparation.run(known)
    summary = summary_of(data.cache, index, time.perf_counter() - started, preparation.encoded)
    report(summary, callbacks)
    return summary


def _remove_text(cache: Path) -> None:
    """Remove what the text encoders made; call it before settings.json names others, in case of a kill."""
    with disk_errors(cache):
        (cache / "index.json").unlink(missing_ok=True)
        for shard in (cache / "shards").glob("text*"):
            shard.unlink()


class Preparation:
    """One run of `prepare` over an unfinished cache."""

    def __init__(
        self,
        config: Config,
        folder: Pipeline,
        source: PreferencePairs,
        buckets: list[Size],
        callbacks: Callbacks,
    ) -> None:
        self.data, self.folder, self.source = config.data, folder, source
        self.buckets, self.callbacks = buckets, callbacks
        self.cache, self.vram = config.data.cache, config.train.vram
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with disk_errors(self.cache):
            (self.cache / "shards").mkdir(exist_ok=True)
            (self.cache / "scan").mkdir(exist_ok=True)
            for leftover in self.cache.rglob(".*.tmp"):
                leftover.unlink()
        self.encoded = 0
        self.families = {name: ShardFamily(self.cache / "shards", name) for name in shards.FAMILIES}

    def run(self, known: dict[str, Any]) -> dict[str, Any]:
        """All steps; returns the index, for which `known` is what is known of the cache beforehand."""
        with stage(self.callbacks, "scan", len(self.source)) as advance:
            rows = scan(self.source, known["source"], self.cache / "scan", advance)
        choice = choose(rows, self.buckets, self.data.max_crop, self._prompt_keys(rows))
        self._check_skipped(choice, len(rows))
        self._check_disk(choice)

        # From here on the files of an older index no longer belong together.
        with disk_errors(self.cache):
            (self.cache / "index.json").unlink(missing_ok=True)
        if self.device.type == "cuda":
            self.callbacks.message("TF32 is off while prompts and images are encoded")
        with exact_fp32():
            self._embed_prompts(choice)
            self._check_skipped(choice, len(rows))
            self._encode_images(choice)
            self._check_skipped(choice, len(rows))
        return finish(self.data, choice, self.families, self.folder, known)

    def _prompt_keys(self, rows: list[ScannedRow]) -> dict[str, bytes]:
        """The key of every prompt; all spellings of a prompt share the stored embeddings."""
        prompts = (row.prompt for row in rows if not row.reason)
        keys = prompt_keys(self.folder, prompts, self.data.max_tokens)
        for prompt, key in keys.items():
            for which in BOTH:
                self.families[f"text{which}"].alias(key, spelling_key(prompt))
        return keys

    def _embed_prompts(self, choice: Choice) -> None:
        """Encode what is new, and skip what cannot be encoded."""
        embed_prompts(
            choice.prompts,
            self.families,
            self.folder,
            max_tokens=self.data.max_tokens,
            device=self.device,
            callbacks=self.callbacks,
        )
        for which in BOTH:
            failed = self.families[f"text{which}"].failed
            detail = f"text encoder {which} gives values for its prompt that are not finite"
            choice.skip("non-finite embedding", detail, [pair.prompt in failed for pair in choice.pairs])

    def _encode_images(self, choice: Choice) -> None:
        """Encode what is new, and skip what cannot be encoded."""
        encode_images(
            choice.images,
            self.families["latents"],
            self.source,
            self.folder,
            self.data,
            vram=self.vram,
            device=self.device,
            callbacks=self.callbacks,
        )
        failed = self.families["latents"].failed
        detail = "the VAE gives non-finite latents even in fp32"
        bad = [not failed.isdisjoint(pair.images.values()) for pair in choice.pairs]
        choice.skip("non-finite latent", detail, bad)

    def _check_skipped(self, choice: Choice, rows: int) -> None:
        """List the skipped rows, and stop where there are more than `data.max_skipped` allows."""
        path = self.cache / SKIPPED
        order = sorted(choice.skipped, key=lambda row: row.index)
        write_lines(path, ({"row": r.name, "reason": r.reason, "detail": r.detail} for r in order))
        found = reasons(choice.skipped)
        counts = ", ".join(f"{n} × {reason}" for reason, n in found.items())
        remedies = "".join(f"; {reason}{remedy(reason)}" for reason in found if remedy(reason))
        if len(choice.skipped) > self.data.max_skipped * rows:
            share = len(choice.skipped) / rows
            raise UserError(
                f"{share:.0%} of {rows} rows would be skipped ({counts}), data.max_skipped allows "
                f"{self.data.max_skipped:.0%}: see {path}, fix the data or raise data.max_skipped{remedies}"
            )
        if not choice.pairs:
            raise UserError(
                f"data.source {self.data.source} has no usable pair ({counts or 'it is empty'}){remedies}"
            )

    def _check_disk(self, choice: Choice) -> None:
        """Raise where the disk has no space for the data to be encoded."""
        jobs = [job for job in choice.images if job.key not in self.families["latents"]]
        latents = sum(latent_bytes(self.folder, self.data, job.bucket) for job in jobs)
        new = sum(key not in self.families["text2"] for key in choice.prompts)
        each = prompt_bytes(self.folder, self.data.max_tokens)
        self.encoded = len(jobs)
        need = int(1.01 * (latents + new * each)) + 2**20
        free = shutil.disk_usage(self.cache).free
        self.callbacks.message(
            f"disk need: {_size(need)} = {len(jobs)} images ({_size(latents)}) + {new} prompts × "
            f"{_size(each)}; free: {_size(free)}",
        )
        if need > free:
            raise UserError(
                f"the cache needs {_size(need)} more in {self.cache}, only {_size(free)} are free: free some "
                "space or choose another data.cache"
            )


def _size(count: int) -> str:
    if count < 10_000_000:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 10_000_000_000 else f"{count / 1e9:.1f} GB"
