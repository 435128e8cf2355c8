"""The cache that `mapo-fast prepare` writes and training reads: it needs only the UNet in addition.

    settings.json     identity of the cache: model and settings; written first
    shards/           latents, text-encoder states (see `shards`)
    pairs.npy         one fixed-size record per pair (`PAIR`): training pairs sorted by bucket and id, then
                      held-out pairs sorted by id
    rows.parquet      name in the source, prompt and split of every pair, in the order of pairs.npy
    skipped.jsonl     rows that are not in the cache, and why
    truncated.jsonl   prompts that lost text
    scan/             results of the scan, for a later run
    index.json        written last: counts, summary, SHA-256 and size of pairs.npy, rows.parquet and every
                      shard, SHA-256 of pairs.npy piece by piece, and a SHA-256 of all this; without it the
                      cache is unfinished
    .lock             held by a running prepare

A cache of single images has one record for each: a wanted one has the chosen half alone, an unwanted one the
rejected half.

Records of pairs.npy are read and pairs made on access, so that opening is quick and memory flat however many
there are. Shards are memory-mapped. A cache of up to `VERIFIED_AT_ONCE` bytes is checked as a whole
when it is opened; a larger one piece by piece and shard by shard, each when it is first read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mapo_fast.data.index import CacheIndex, cache_settings, missing, reading
from mapo_fast.data.shards import shard_path
from mapo_fast.data.table import NOWHERE, CachedPair, PairRows, PairTable
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.settings.schema import DataConfig

__all__ = ["CachedPair", "PairBatch", "PairCache", "PairRow", "SampleBatch"]

OPEN_SHARDS = 128
VERIFIED_AT_ONCE = 512 * 2**20
"""Bytes of files up to which a whole cache is checked when it is opened, in about half a second."""


@dataclass(frozen=True)
class PairRow:
    """Source and prompt of a pair."""

    name: str
    prompt: str


@dataclass(frozen=True)
class PairBatch:
    """B pairs, CPU tensors; latents are already scaled for the UNet."""

    chosen_latents: Tensor  # (B, C, h, w) fp32 or bf16, as data.vae_dtype
    rejected_latents: Tensor  # (B, C, h, w)
    prompt_embeds: Tensor  # (B, S, D) fp32
    pooled_embeds: Tensor  # (B, P) fp32
    time_ids_chosen: Tensor  # (B, 6) fp32
    time_ids_rejected: Tensor  # (B, 6) fp32


@dataclass(frozen=True)
class SampleBatch:
    """n single images, CPU tensors."""

    latents: Tensor  # (n, C, h, w) fp32 or bf16, as data.vae_dtype
    prompt_embeds: Tensor  # (n, S, D) fp32
    pooled_embeds: Tensor  # (n, P) fp32
    time_ids: Tensor  # (n, 6) fp32


class PairCache:
    """A finished cache; make one with `PairCache.open`."""

    def __init__(self, index: CacheIndex, table: PairTable) -> None:
        self.index, self.folder, self.settings = index, index.folder, index.settings
        self._table = table
        self.train = PairRows(table, 0, index.train)
        self.held_out = PairRows(table, index.train, len(table))
        self.flips, self.labelled, self.paired = index.flips, index.labelled, index.paired
        self._shards: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        """Lock of the open shards: a batch may be read ahead while another one is evaluated."""

    @classmethod
    def open(cls, folder: Path, *, verify: bool | None = None) -> PairCache:
        """Open a finished cache.

        Args:
            folder: the cache's folder, `data.cache`.
            verify: check the SHA-256 of every file now. False checks everything when it is first read; None
                does so for caches of more than `VERIFIED_AT_ONCE` bytes.

        Raises:
            UserError: missing, unfinished, damaged, or made by another version.
        """
        index = CacheIndex.open(folder)
        if verify is None:
            verify = index.bytes <= VERIFIED_AT_ONCE
        if verify:
            index.verify_all()
        with reading(folder):
            table = PairTable(folder / "pairs.npy", () if verify else index.content["pieces"])
        return cls(index, table)

    @property
    def fingerprint(self) -> str:
        """See `CacheIndex.fingerprint`."""
        return self.index.fingerprint

    def check(self, folder: Pipeline, data: DataConfig) -> None:
        """Check that the cache was made with this model's encoders and these settings.

        The UNet is not looked at: several UNets may share a cache.

        Raises:
            UserError: naming what differs.
        """
        self.index.check(cache_settings(folder, data), data.held_out)

    def rows(self, pairs: Sequence[CachedPair]) -> list[PairRow]:
        """Source name and prompt of pairs."""
        import pyarrow.parquet as pq

        self.index.verify("rows.parquet")
        table = pq.read_table(self.folder / "rows.parquet", columns=["name", "prompt"])
        return [PairRow(**row) for row in table.take([pair.index for pair in pairs]).to_pylist()]

    def labels(self, pairs: Sequence[CachedPair]) -> Tensor:
        """(B,) fp32 soft labels: probability that the chosen image is better; for a `labelled` cache."""
        return torch.tensor([float(self._table[pair.index]["label"]) for pair in pairs])

    def wanted(self, samples: Sequence[CachedPair]) -> Tensor:
        """(n,) bool, which single images are wanted; for a cache that is not `paired`."""
        return torch.tensor([self._half(self._table[sample.index]) == "chosen" for sample in samples])

    def batch(
        self,
        pairs: Sequence[CachedPair],
        *,
        flip: Sequence[bool] | None,
        drop: Sequence[bool] | None,
    ) -> PairBatch:
        """Load pairs of one bucket.

        Args:
            pairs: at least one; all of one bucket.
            flip: per pair, whether both halves are mirrored. Needs `flips`.
            drop: per pair, whether the prompt is replaced by the empty prompt.

        Raises:
            ValueError: no pairs, several buckets, or flip without mirrored latents.
            UserError: a shard turns out to be damaged.
        """
        records = self._records(pairs, flip)
        prompt_embeds, pooled_embeds = self._text(records, drop)
        chosen, rejected = (
            self._images(records, [half] * len(records), pairs[0].bucket, flip)
            for half in ("chosen", "rejected")
        )
        return PairBatch(
            chosen_latents=chosen[0],
            rejected_latents=rejected[0],
            prompt_embeds=prompt_embeds,
            pooled_embeds=pooled_embeds,
            time_ids_chosen=chosen[1],
            time_ids_rejected=rejected[1],
        )

    def samples(
        self,
        samples: Sequence[CachedPair],
        *,
        flip: Sequence[bool] | None,
        drop: Sequence[bool] | None,
    ) -> SampleBatch:
        """Load single images of one bucket; as `batch`, for a cache that is not `paired`."""
        records = self._records(samples, flip)
        halves = [self._half(record) for record in records]
        latents, time_ids = self._images(records, halves, samples[0].bucket, flip)
        return SampleBatch(latents, *self._text(records, drop), time_ids)

    def _records(self, pairs: Sequence[CachedPair], flip: Sequence[bool] | None) -> list[np.void]:
        if not pairs or len({pair.bucket for pair in pairs}) > 1:
            raise ValueError(f"a batch needs pairs of exactly one bucket, got {[p.bucket for p in pairs]}")
        if flip is not None and any(flip) and not self.flips:
            raise ValueError("this cache holds no mirrored latents (data.flip = false)")
        return [self._table[pair.index] for pair in pairs]

    @staticmethod
    def _half(record: np.void) -> str:
        """The half that a single image is."""
        return "rejected" if tuple(record["chosen"]) == NOWHERE else "chosen"

    def _images(
        self,
        records: Sequence[np.void],
        halves: Sequence[str],
        bucket: tuple[int, int],
        flip: Sequence[bool] | None,
    ) -> tuple[Tensor, Tensor]:
        """Latents and time ids of one half of each record."""
        name = "latents_{}x{}".format(*bucket)
        found = [self._item("latents", name, r[half]) for r, half in zip(records, halves, strict=True)]
        if self.flips:
            mirrored = flip if flip is not None else [False] * len(records)
            found = [latent[int(m)] for latent, m in zip(found, mirrored, strict=True)]
        ids = np.stack([record[f"time_ids_{half}"] for record, half in zip(records, halves, strict=True)])
        return torch.stack(found), torch.from_numpy(ids)

    def _text(self, records: Sequence[np.void], drop: Sequence[bool] | None) -> tuple[Tensor, Tensor]:
        """Prompt embeddings and pooled ones."""

        def text(family: str, name: str) -> Tensor:
            empty = self.index.content["empty"][family]
            dropped = drop if drop is not None else [False] * len(records)
            places = [empty if d else record[family] for record, d in zip(records, dropped, strict=True)]
            return torch.stack([self._item(family, name, place).float() for place in places])

        hidden = torch.cat([text("text1", "hidden"), text("text2", "hidden")], dim=-1)
        return hidden, text("text2", "pooled")

    def _item(self, family: str, name: str, place: Sequence[int]) -> Tensor:
        shard, row = int(place[0]), int(place[1])
        item: Tensor = self._shard(family, shard).get_slice(name)[row]
        return item

    def _shard(self, family: str, number: int) -> Any:
        key = (family, number)
        with self._lock:
            if key not in self._shards:
                path = shard_path(self.folder / "shards", family, number)
                if not path.is_file():
                    raise missing(path)
                self.index.verify(f"shards/{path.name}")
                with reading(self.folder):
                    self._shards[key] = safe_open(path, framework="pt")
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)  # the file closes with its last reference
            self._shards.move_to_end(key)
            return self._shards[key]
