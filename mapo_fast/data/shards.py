"""Shards: safetensors files of bounded size with encoded data, addressed by content.

A family of shards is `latents-00000.safetensors`, `latents-00001.safetensors`, …; there are three families:

    latents   per bucket: `latents_HxW` (n, C, h, w), or (n, 2, C, h, w) with the mirror image second, and
              `keys_HxW` (n, 16) uint8; `failed` (m, 16): keys of images whose latents stay non-finite
    text1     `hidden` (n, S, D₁) of the first text encoder, `keys` (n, 16); `failed` (m, 16): keys of prompts
              whose embeddings are not finite
    text2     `hidden` (n, S, D₂), `pooled` (n, P) of the second, `keys` (n, 16), `failed`

A shard says itself what it holds and is renamed into place only when it is complete. After that its SHA-256
goes to `latents-00000.sha256` next to it (in the format of `sha256sum`): whatever stands in the folder with
such a record after a kill is checked and reused, and only what no shard holds is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, read_bytes, sha256_file, unreadable
from mapo_fast.util.tensorfile import write_tensors

SHARD_BYTES = 256 * 2**20
FAMILIES = ("latents", "text1", "text2")


class Place(NamedTuple):
    """Where a stored item is: shard number, row in the shard's tensor."""

    shard: int
    row: int


class ShardFamily:
    """The finished shards of one family in a folder.

    Opening a family reads every shard. A shard without a record was cut short by a kill and is removed.
    Stored text that is not finite, which was possible before cache format 4, counts as failed.

    Raises:
        UserError: a shard is not what its record says.
    """

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        self.places: dict[bytes, Place] = {}
        self.failed: set[bytes] = set()
        self.retries = 0
        self.digests: dict[str, str] = {}
        """SHA-256 of every shard by file name."""
        with disk_errors(folder):
            self._remove_halves()
        for path in self.paths():
            try:
                digest = self.digests[path.name] = sha256_file(path)
                if read_bytes(_record(path), 4096).decode() != _record_text(path, digest):
                    raise ValueError("its checksum is not the one it was written with")
                with safe_open(path, framework="pt") as file:
                    keys = {n: file.get_tensor(n) for n in file.keys() if n.startswith(("keys", "failed"))}  # noqa: SIM118
                    self._register(path, keys, file.metadata())
                    for name in {"hidden", "pooled"} & set(file.keys()):
                        self._forget(_not_finite(file.get_tensor(name), keys["keys"]))
            except OSError as error:
                raise unreadable(f"shard {path}", error) from None
            except (SafetensorError, ValueError) as error:
                raise UserError(
                    f"shard {path} is damaged ({error}): delete it and run prepare again"
                ) from None

    def __contains__(self, key: bytes) -> bool:
        """Whether the item has been dealt with: stored, or failed."""
        return key in self.places or key in self.failed

    def alias(self, key: bytes, other: bytes) -> None:
        """Let `key` refer to the item stored under `other`, if only the latter has been dealt with."""
        if key not in self and other in self.places:
            self.places[key] = self.places[other]
        elif key not in self and other in self.failed:
            self.failed.add(key)

    def paths(self) -> list[Path]:
        """The shard files in order."""
        with disk_errors(self.folder):  # a glob would take a folder without permission for an empty one
            return sorted(
                path for path in self.folder.iterdir() if path.match(f"{self.family}-*.safetensors")
            )

    def write(self, tensors: Mapping[str, Tensor], retries: int = 0) -> None:
        """Write one shard under the lowest free number, atomically."""
        have, number = set(self.paths()), 0
        while (path := shard_path(self.folder, self.family, number)) in have:
            number += 1
        metadata = {"format": "mapo_fast cache shard", "nan_retries": str(retries)}
        with atomic_path(path) as temporary:
            digest = self.digests[path.name] = write_tensors(temporary, tensors, metadata)
        with atomic_path(_record(path)) as temporary:
            temporary.write_text(_record_text(path, digest), encoding="utf-8", newline="\n")
        self._register(path, tensors, metadata)

    def _remove_halves(self) -> None:
        """Remove shards without a record, which a kill leaves, and records without a shard."""
        for path in self.paths():
            if not _record(path).is_file():
                path.unlink()
        for record in self.folder.glob(f"{self.family}-*.sha256"):
            if not record.with_suffix(".safetensors").is_file():
                record.unlink()

    def _forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self.places.pop(key, None)
            self.failed.add(key)

    def _register(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        number = int(path.stem.rpartition("-")[2])
        for name, values in tensors.items():
            if name == "failed":
                self.failed |= set(_unpack(values))
            elif name.startswith("keys"):
                self.places.update((key, Place(number, row)) for row, key in enumerate(_unpack(values)))
        self.retries += int(metadata["nan_retries"])


def _not_finite(values: Tensor, keys: Tensor) -> list[bytes]:
    bad = ~values.isfinite().flatten(1).all(dim=1)
    return _unpack(keys[bad])


def shard_path(folder: Path, family: str, number: int) -> Path:
    """File of a shard."""
    return folder / f"{family}-{number:05d}.safetensors"


def _record(shard: Path) -> Path:
    return shard.with_suffix(".sha256")


def _record_text(shard: Path, digest: str) -> str:
    return f"{digest}  {shard.name}\n"


def pack_keys(keys: list[bytes]) -> Tensor:  # (n, 16) uint8
    """16-byte keys as a tensor."""
    flat: Any = np.frombuffer(b"".join(keys), dtype=np.uint8).copy()
    return torch.from_numpy(flat).view(-1, 16)


def _unpack(keys: Tensor) -> list[bytes]:
    data = keys.contiguous().numpy().tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]
