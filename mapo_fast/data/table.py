"""`pairs.npy`: one record of fixed size for every pair of a cache, or for every single image."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from mapo_fast.data.index import damaged, reading

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
"""Place in the shards of the half that a single image does not have."""
PIECE = 2**15
"""Number of rows of pairs.npy per SHA-256."""


@dataclass(frozen=True)
class CachedPair:
    """One pair of the cache, or one single image."""

    id: str
    """32 hex digits: hash of prompt, chosen and rejected image."""
    bucket: tuple[int, int]
    """(height, width) in pixels of both images."""
    index: int
    """The pair's row in the cache's table."""


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
                raise damaged(self._path)
            self._unchecked.pop(piece, None)
        return np.frombuffer(self._read(row, 1), PAIR)[0]

    def _read(self, row: int, count: int) -> bytes:
        with reading(self._path.parent), self._lock:
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
