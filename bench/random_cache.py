"""Write a cache of random latents and embeddings in the format of `mapo-fast prepare`.

Any number of pairs share a few distinct items, so that millions of them need no disk but the pair table's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mapo_fast.data import shards
from mapo_fast.data.buckets import Size, time_ids
from mapo_fast.data.index import FORMAT, write_index
from mapo_fast.data.prompts import EMPTY
from mapo_fast.data.shards import ShardFamily, pack_keys
from mapo_fast.data.table import PAIR, table_digests
from mapo_fast.util.files import sha256_file

DISTINCT = 8
"""Number of different latents per bucket, and of different prompts."""


def write_random_cache(
    folder: Path,
    pairs: int,
    buckets: Sequence[Size],
    *,
    vae_factor: int,
    text_widths: tuple[int, int],
    pooled: int,
) -> Path:
    """Write a cache of `pairs` training pairs, spread evenly over the buckets.

    Args:
        folder: new; returned.
        buckets: (height, width) in pixels.
        vae_factor: pixels per latent.
        text_widths: of the two text encoders.
        pooled: width of the pooled text embedding.
    """
    (folder / "shards").mkdir(parents=True)
    families = {name: ShardFamily(folder / "shards", name) for name in shards.FAMILIES}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    keys = [i.to_bytes(16, "little") for i in range(DISTINCT)]
    for height, width in sorted(buckets):
        name = f"{height}x{width}"
        latents = draw(DISTINCT, 4, height // vae_factor, width // vae_factor)
        families["latents"].write({f"latents_{name}": latents, f"keys_{name}": pack_keys(keys)})
    prompts = [EMPTY, *keys[1:]]
    for family, width in zip(("text1", "text2"), text_widths, strict=True):
        tensors = {"hidden": draw(DISTINCT, 77, width).half(), "keys": pack_keys(prompts)}
        if family == "text2":
            tensors["pooled"] = draw(DISTINCT, pooled).half()
        families[family].write(tensors)

    table = _table(pairs, sorted(buckets))
    np.save(folder / "pairs.npy", table, allow_pickle=False)
    names = ["pairs.npy", *(f"shards/{path.name}" for f in families.values() for path in f.paths())]
    index: dict[str, Any] = {
        "settings": {"format": FORMAT, "flip": False},
        "held_out": 0.0,
        "pairs": pairs,
        "train": pairs,
        "pieces": table_digests(table),
        "empty": {"text1": [0, 0], "text2": [0, 0]},
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
            for name in names
        },
    }
    write_index(folder, index)
    return folder


def _table(pairs: int, buckets: Sequence[Size]) -> np.ndarray:
    random = np.random.default_rng(0)
    table = np.zeros(pairs, PAIR)
    table["label"] = np.nan
    table["id"] = np.sort(random.integers(0, 2**63, (pairs, 2)), axis=0).astype(">u8").view("u1")
    bucket = np.sort(random.integers(0, len(buckets), pairs))
    table["bucket"] = np.array(buckets)[bucket]
    conditions = np.array([time_ids(size, size, "shared") for size in buckets])[bucket]
    chosen = random.integers(0, DISTINCT, pairs)
    rejected = (chosen + random.integers(1, DISTINCT, pairs)) % DISTINCT  # another one
    for side, row in (("chosen", chosen), ("rejected", rejected)):
        table[side] = np.stack([bucket, row], axis=1)
        table[f"time_ids_{side}"] = conditions
    table["text1"][:, 1] = table["text2"][:, 1] = random.integers(0, DISTINCT, pairs)
    return table
