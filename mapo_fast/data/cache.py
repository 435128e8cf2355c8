"""The cache that `mapo-fast prepare` writes and training reads: nothing but the UNet is needed beside it.

    settings.json     what the cache is made for; written first
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

import hashlib
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mapo_fast.data.shards import shard_path
from mapo_fast.models.identity import encoders_identity
from mapo_fast.models.pipeline import Component, PipelineFolder
from mapo_fast.settings.schema import DataConfig
from mapo_fast.settings.table import affecting
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import JSON_BYTES, parse_json, read_bytes, sha256_file, unreadable

FORMAT = 4
TAKEN_OVER = (2, 3)
"""Formats whose shards are alike: `prepare` only writes the tables of such a cache anew."""
ENCODERS: tuple[Component, ...] = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PAIR = np.dtype(
    [
        ("id", "u1", 16),
        ("bucket", "<i4", 2),  # height, width in pixels
        ("chosen", "<i4", 2),  # shard, row of the latents
        ("rejected", "<i4", 2),
        ("text1", "<i4", 2),
        ("text2", "<i4", 2),
        ("time_ids_chosen", "<f4", 6),
        ("time_ids_rejected", "<f4", 6),
        ("label", "<f4"),  # how probably chosen is the better one; NaN where the source does not say
    ]
)
NOWHERE = (-1, -1)
"""Place of the half that a single image does not have."""
OPEN_SHARDS = 128
PIECE = 2**15
"""Rows of pairs.npy that have a SHA-256 of their own."""
VERIFIED_AT_ONCE = 512 * 2**20
"""Of a cache this large the check takes about half a second."""


def cache_settings(folder: PipelineFolder, data: DataConfig) -> dict[str, Any]:
    """All that decides what a cache holds, given the same source; `held_out` only moves pairs about."""
    return {
        "format": FORMAT,
        "model": encoders_identity(folder),
        "zeros_for_empty_prompt": folder.zeros_for_empty_prompt,
        **{row.key: getattr(data, row.key) for row in affecting("cache")},
    }


def difference(have: dict[str, Any], want: dict[str, Any]) -> str | None:
    """The first difference between two settings in words, or None."""
    younger = {row.key: row.default for row in affecting("cache")}  # settings may be younger than a cache
    have = younger | have
    have.pop("before", None)
    if have.get("format") != want["format"]:
        return f"has cache format {have.get('format')}, this version writes {want['format']}"
    for name in (row.key for row in affecting("cache")):
        if have.get(name) != want[name]:
            return f"was made for data.{name} = {have.get(name)}, the config says {want[name]}"
    if have != want:
        return "was made with another VAE, text encoder or tokenizer than model.path has"
    return None


def translated(have: dict[str, Any], want: dict[str, Any], folder: PipelineFolder) -> dict[str, Any]:
    """The settings of a cache of an earlier format as they would be of this one.

    Before format 4 a model was known by its files, with their names and their configs' whole text. The
    settings that were stay beside: runs know the cache by them.
    """
    if have.get("format") not in TAKEN_OVER:
        return have
    same = have.get("model") == folder.fingerprint(ENCODERS)
    model = want["model"] if same else have.get("model")
    return {**have, "format": FORMAT, "model": model, "before": have}


@dataclass(frozen=True)
class CachedPair:
    """One pair of the cache, or one single image."""

    id: str
    """32 hex digits: hash of prompt, chosen and rejected image."""
    bucket: tuple[int, int]
    """(height, width) in pixels of both images."""
    index: int
    """Its row in the cache's table."""


@dataclass(frozen=True)
class PairRow:
    """Where a pair comes from."""

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


class PairTable:
    """The records of pairs.npy, read one by one and checked before that.

    Not memory-mapped: pages that were read would stay in the process's memory, in the end all of them.

    Args:
        path: pairs.npy, (n,) of `PAIR`.
        digests: SHA-256 of every `PIECE` records; empty for a table that has been checked as a whole.
    """

    def __init__(self, path: Path, digests: Sequence[str]) -> None:
        header: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        self._length, self._offset = len(header), header.offset
        self._path, self._unchecked = path, dict(enumerate(digests))
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of pairs."""
        return self._length

    def __getitem__(self, row: int) -> Any:
        """One record. Raises `UserError` if its piece is damaged."""
        piece = row // PIECE
        digest = self._unchecked.get(piece)  # which another thread may check at the same time
        if digest is not None:
            if digest != hashlib.sha256(self._read(piece * PIECE, PIECE)).hexdigest():
                raise _damaged(self._path)
            self._unchecked.pop(piece, None)
        return np.frombuffer(self._read(row, 1), PAIR)[0]

    def _read(self, row: int, count: int) -> bytes:
        with _reading(self._path.parent), self._lock:
            self._file.seek(self._offset + row * PAIR.itemsize)
            return self._file.read(count * PAIR.itemsize)


def table_digests(records: np.ndarray) -> list[str]:
    """SHA-256 of every `PIECE` records."""
    starts = range(0, len(records), PIECE)
    return [hashlib.sha256(records[start : start + PIECE].tobytes()).hexdigest() for start in starts]


class PairRows(Sequence[CachedPair]):
    """A range of the pair table; `CachedPair`s are made on access."""

    def __init__(self, table: PairTable, start: int, stop: int) -> None:
        self._table, self._range = table, range(start, stop)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> CachedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedPair]: ...
    def __getitem__(self, index: int | slice) -> CachedPair | list[CachedPair]:
        """A pair, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self._pair(row) for row in self._range[index]]
        return self._pair(self._range[index])

    def _pair(self, row: int) -> CachedPair:
        record = self._table[row]
        height, width = record["bucket"].tolist()
        return CachedPair(record["id"].tobytes().hex(), (height, width), row)


class PairCache:
    """A finished cache; make one with `PairCache.open`."""

    def __init__(self, folder: Path, index: dict[str, Any], table: PairTable, unverified: set[str]) -> None:
        self.folder, self.index, self._table = folder, index, table
        self.settings: dict[str, Any] = index["settings"]
        self.train = PairRows(table, 0, index["train"])
        self.held_out = PairRows(table, index["train"], len(table))
        self.flips: bool = self.settings["flip"]
        self.labelled: bool = index.get("labelled", False)
        """Whether every pair has a soft label."""
        self.paired: bool = index.get("paired", True)
        """Whether it holds pairs; else single images, each wanted or unwanted."""
        self._unverified = unverified
        self._shards: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        """Of the open shards: a batch may be read ahead while another one is evaluated."""

    @classmethod
    def open(cls, folder: Path, *, verify: bool | None = None) -> PairCache:
        """Open a finished cache.

        Args:
            folder: what `data.cache` names.
            verify: check the SHA-256 of every file now. False checks everything when it is first read; None
                does so for caches of more than `VERIFIED_AT_ONCE` bytes.

        Raises:
            UserError: missing, unfinished, damaged, or made by another version.
        """
        index = read_index(folder)
        if index is None:
            state = "is not a mapo_fast cache"
            if (folder / "settings.json").is_file():
                state = "is unfinished, or of an earlier version whose latents can be kept"
            raise UserError(f"data.cache {folder} {state}: run mapo-fast prepare")
        unverified = set(index["files"])
        if verify is None:
            verify = sum(entry["bytes"] for entry in index["files"].values()) <= VERIFIED_AT_ONCE
        with _reading(folder):
            for name, entry in index["files"].items():
                path = folder / name
                if not path.is_file():
                    raise _missing(path)
                if path.stat().st_size != entry["bytes"]:
                    raise _damaged(path)
            for name in sorted(unverified) if verify else ():
                _verify(folder, name, index, unverified)
            table = PairTable(folder / "pairs.npy", () if verify else index["pieces"])
        return cls(folder, index, table, unverified)

    @property
    def fingerprint(self) -> str:
        """Identity of the cache's content: settings, pairs and split, shards.

        One that was taken over from an earlier format, and whose pairs and split are the same, keeps its own.
        """
        settings = self.settings.get("before", self.settings)
        identity = {"settings": settings, "train": self.index["train"], "files": self.index["files"]}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def check(self, folder: PipelineFolder, data: DataConfig) -> None:
        """Check that the cache was made with this model's encoders and these settings.

        The UNet is not looked at: several UNets may share a cache.

        Raises:
            UserError: naming what differs.
        """
        if reason := difference(self.settings, cache_settings(folder, data)):
            raise UserError(
                f"data.cache {self.folder} {reason}: run mapo-fast prepare again with another data.cache"
            )
        if self.index["held_out"] != data.held_out:
            raise UserError(
                f"data.cache {self.folder} was made for data.held_out = {self.index['held_out']}, the config "
                f"says {data.held_out}: run mapo-fast prepare again (nothing is encoded twice)"
            )

    def rows(self, pairs: Sequence[CachedPair]) -> list[PairRow]:
        """Source name and prompt of pairs."""
        import pyarrow.parquet as pq

        with _reading(self.folder):
            _verify(self.folder, "rows.parquet", self.index, self._unverified)
        table = pq.read_table(self.folder / "rows.parquet", columns=["name", "prompt"])
        return [PairRow(**row) for row in table.take([pair.index for pair in pairs]).to_pylist()]

    def labels(self, pairs: Sequence[CachedPair]) -> Tensor:
        """(B,) fp32 soft labels, how probably the chosen image is the better one; for a `labelled` cache."""
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
        """Which half a single image is."""
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
            empty = self.index["empty"][family]
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
                    raise _missing(path)
                with _reading(self.folder):
                    _verify(self.folder, f"shards/{path.name}", self.index, self._unverified)
                    self._shards[key] = safe_open(path, framework="pt")
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)  # the file closes with its last reference
            self._shards.move_to_end(key)
            return self._shards[key]


def read_index(folder: Path) -> dict[str, Any] | None:
    """`index.json` of a finished cache; None where there is none, or one whose tables are to be made anew.

    Raises:
        UserError: it is damaged or edited, or of another version.
    """
    path = folder / "index.json"
    try:
        text = read_bytes(path, JSON_BYTES)
        index: dict[str, Any] = parse_json(text)
        written_by = index["settings"]["format"]
        if written_by == FORMAT and index["sha256"] != index_digest(index):
            raise ValueError("its content is not what was written")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(f"data.cache {folder}", error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({reason}): delete it and run mapo-fast prepare again") from None
    if written_by in TAKEN_OVER:
        return None
    if written_by != FORMAT:
        raise UserError(
            f"data.cache {folder} has cache format {written_by}, this version reads {FORMAT}: prepare "
            "another data.cache"
        )
    return index


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """One `UserError` for a file that cannot be read; it is not damaged."""
    try:
        yield
    except OSError as error:
        raise unreadable(f"data.cache {folder}", error) from error


def index_digest(index: dict[str, Any]) -> str:
    """SHA-256 of an index without its own `sha256`."""
    content = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verify(folder: Path, name: str, index: dict[str, Any], unverified: set[str]) -> None:
    if name in unverified:
        if sha256_file(folder / name) != index["files"][name]["sha256"]:
            raise _damaged(folder / name)
        unverified.discard(name)


def _missing(path: Path) -> UserError:
    return UserError(f"{path} is missing from the cache: run mapo-fast prepare again")


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged (its checksum is not the one it was written with): delete it and run "
        "mapo-fast prepare again, which makes only this file anew"
    )
