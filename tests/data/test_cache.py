"""A finished cache is read, and its files are checked."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_fast.data import cache as cache_module
from mapo_fast.data.cache import CachedPair, PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    contents,
)
from tests.data.preparing import SHARDS, flip_byte


@pytest.mark.slow
def test_pairs(prepared: Path) -> None:
    cache = PairCache.open(prepared)
    assert (len(cache.train), len(cache.held_out)) == (11, 1)
    ids = [pair.id for pair in [*cache.train, *cache.held_out]]
    assert len(set(ids)) == 12
    assert all(len(i) == 32 and int(i, 16) >= 0 for i in ids)
    assert cache.train[-1] == cache.train[10]
    assert cache.train[2:4] == [cache.train[2], cache.train[3]]
    assert all(pair.bucket == (32, 32) for pair in cache.train)
    with pytest.raises(IndexError):
        cache.train[11]
    assert not cache.flips


def test_batch_is_the_stack_of_its_pairs(prepared: Path) -> None:
    cache = PairCache.open(prepared)
    pairs = [cache.train[i] for i in (5, 0, 5)]
    batch = cache.batch(pairs, flip=None, drop=[False, True, False])
    for i, pair in enumerate(pairs):
        single = cache.batch([pair], flip=[False], drop=[i == 1])
        for name in vars(batch):
            assert torch.equal(getattr(batch, name)[i], getattr(single, name)[0]), name
    assert not batch.prompt_embeds[1].any()
    assert batch.prompt_embeds[0].any()
    rows = cache.rows(pairs)
    assert rows[0] == rows[2] != rows[1]


def test_batch_refuses_mixed_buckets_and_missing_mirrors(prepared: Path) -> None:
    cache = PairCache.open(prepared)
    pair = cache.train[0]
    other = CachedPair(pair.id, (40, 24), pair.index)
    with pytest.raises(ValueError, match="exactly one bucket"):
        cache.batch([pair, other], flip=None, drop=None)
    with pytest.raises(ValueError, match="exactly one bucket"):
        cache.batch([], flip=None, drop=None)
    with pytest.raises(ValueError, match="no mirrored latents"):
        cache.batch([pair], flip=[True], drop=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARDS, "pairs.npy", "rows.parquet"])
def test_damaged_file_is_named_and_can_be_made_anew(
    tiny_sdxl: Path, prepared: Path, copy: Path, name: str
) -> None:
    whole = contents(copy)
    flip_byte(copy / name)
    with pytest.raises(UserError, match=rf"{Path(name).name} is damaged \(its checksum") as error:
        PairCache.open(copy)
    assert "\n" not in str(error.value)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{Path(name).name} is missing"):
        PairCache.open(copy)
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == whole


def test_unverified_cache_checks_a_shard_when_it_is_first_read(copy: Path) -> None:
    flip_byte(copy / SHARDS[0])
    cache = PairCache.open(copy, verify=False)
    with pytest.raises(UserError, match=r"latents-00000\.safetensors is damaged"):
        cache.batch(cache.train[:1], flip=None, drop=None)


def test_cut_off_shard(copy: Path) -> None:
    path = copy / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        PairCache.open(copy, verify=False)


@pytest.mark.parametrize("name", ["pairs.npy", "rows.parquet"])
def test_damaged_table_of_a_finished_cache_is_made_anew(
    tiny_sdxl: Path, prepared: Path, copy: Path, name: str
) -> None:
    flip_byte(copy / name)
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == contents(prepared)


def test_few_shards_are_open_at_a_time(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 1)
    cache = PairCache.open(prepared)
    plenty = PairCache.open(prepared)
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 100)
    expected = plenty.batch(plenty.train, flip=None, drop=None)
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 1)
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert len(cache._shards) == 1
    assert torch.equal(batch.prompt_embeds, expected.prompt_embeds)


def test_a_large_cache_is_checked_as_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "VERIFIED_AT_ONCE", 0)
    for name in (SHARDS[0], "rows.parquet"):
        flip_byte(copy / name)
    cache = PairCache.open(copy)
    with pytest.raises(UserError, match="latents-00000"):
        cache.batch(cache.train[:1], flip=None, drop=None)
    with pytest.raises(UserError, match="rows"):
        cache.rows(cache.train[:1])


@pytest.mark.parametrize("name", ["index.json", "pairs.npy", SHARDS[0]])
def test_file_without_permission_is_not_called_damaged(
    tiny_sdxl: Path, prepared: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    io_open, os_open = io.open, os.open

    def forbid(path: Any) -> None:
        if path == copy / name:
            raise PermissionError(13, "Permission denied", str(path))

    def opening(path: Any, *args: Any, **options: Any) -> Any:
        if not args or args[0] in ("r", "rb"):
            forbid(path)
        return io_open(path, *args, **options)

    def opening_low(path: Any, *args: Any, **options: Any) -> int:
        forbid(path)
        return os_open(path, *args, **options)

    monkeypatch.setattr(io, "open", opening)
    monkeypatch.setattr(os, "open", opening_low)
    with pytest.raises(UserError, match=r"^data\.cache .* cannot be read: Permission denied \(.*\)$"):
        PairCache.open(copy)
    if name != "pairs.npy":  # prepare makes the table anew
        with pytest.raises(UserError, match=r"^(data\.cache|shard) .* cannot be read: Permission denied"):
            prepare(config(tiny_sdxl, prepared.parent / "s", copy))


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ELOOP, 2), (errno.ENOENT, 2)]
)
def test_a_shard_that_is_gone_while_it_is_read_is_one_line(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    cache = PairCache.open(prepared, verify=False)

    def refusing(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("mapo_fast.data.index.sha256_file", refusing)
    with pytest.raises(UserError, match=r"^data\.cache .* cannot be read: ") as caught:
        cache.batch([cache.train[0]], flip=None, drop=None)
    assert caught.value.exit_code == code
