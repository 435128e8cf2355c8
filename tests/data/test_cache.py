import errno
import hashlib
import io
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mapo_fast.data import cache as cache_module
from mapo_fast.data.cache import ENCODERS, PAIR, PairCache, PairRows, PairTable, table_digests
from mapo_fast.data.prepare import prepare
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.models.pipeline import open_sdxl
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorfile import write_tensors
from tests.data.pair_sources import config, contents, skipped


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "c"))


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
    other = cache_module.CachedPair(pair.id, (40, 24), pair.index)
    with pytest.raises(ValueError, match="exactly one bucket"):
        cache.batch([pair, other], flip=None, drop=None)
    with pytest.raises(ValueError, match="exactly one bucket"):
        cache.batch([], flip=None, drop=None)
    with pytest.raises(ValueError, match="no mirrored latents"):
        cache.batch([pair], flip=[True], drop=None)


def test_check_accepts_its_own_model_and_settings(tiny_sdxl: Path, prepared: Path) -> None:
    run = config(tiny_sdxl, prepared.parent / "s", prepared)
    PairCache.open(prepared).check(open_sdxl(tiny_sdxl), run.data)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


SHARDS = [
    "shards/latents-00000.safetensors",
    "shards/text1-00001.safetensors",
    "shards/text2-00000.safetensors",
]


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


def test_unreadable_shard_stops_prepare(tiny_sdxl: Path, prepared: Path, copy: Path) -> None:
    (copy / SHARDS[0]).write_bytes(b"not a shard")
    with pytest.raises(UserError, match=r"latents-00000\.safetensors is damaged .* delete it"):
        prepare(config(tiny_sdxl, prepared.parent / "s", copy))


@pytest.mark.parametrize(
    ("remove", "text"),
    [(("index.json",), "is unfinished"), (("index.json", "settings.json"), "is not a mapo")],
)
def test_unfinished_cache(copy: Path, remove: tuple[str, ...], text: str) -> None:
    for name in remove:
        (copy / name).unlink()
    with pytest.raises(UserError, match=text):
        PairCache.open(copy)


def test_missing_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a mapo_fast cache: run mapo-fast prepare"):
        PairCache.open(tmp_path / "nowhere")


def test_damaged_index_and_other_format(copy: Path) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["settings"]["format"] = 99
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cache format 99"):
        PairCache.open(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        PairCache.open(copy)


def edited(index: dict[str, Any], kind: str) -> Any:
    if kind == "train":
        return index | {"train": index["train"] - 1}
    if kind == "settings":
        return index | {"settings": index["settings"] | {"flip": True}}
    if kind == "list":
        return [index]
    return {name: value for name, value in index.items() if name != kind}


@pytest.mark.parametrize("kind", ["train", "settings", "list", "files", "sha256", "summary"])
def test_edited_index_is_refused(tiny_sdxl: Path, prepared: Path, copy: Path, kind: str) -> None:
    path = copy / "index.json"
    path.write_text(json.dumps(edited(json.loads(path.read_text()), kind)))
    before = contents(copy)
    for use in (
        lambda: PairCache.open(copy),
        lambda: prepare(config(tiny_sdxl, prepared.parent / "s", copy)),
    ):
        with pytest.raises(UserError, match=r"index\.json is damaged \([^\n]+\): delete it and run") as error:
            use()
        assert "\n" not in str(error.value)
    assert contents(copy) == before
    path.unlink()
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == contents(prepared)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", SHARDS)
def test_prepare_never_takes_over_a_damaged_shard(
    tiny_sdxl: Path, prepared: Path, copy: Path, name: str, finished: bool
) -> None:
    run = config(tiny_sdxl, prepared.parent / "s", copy)
    flip_byte(copy / name)
    if not finished:
        (copy / "index.json").unlink()
    with pytest.raises(
        UserError, match=rf"{Path(name).name} is damaged \([^\n]+\): delete it and run prepare"
    ):
        prepare(run)
    (copy / name).unlink()
    prepare(run)
    assert contents(copy) == contents(prepared)


def test_shard_without_a_record_is_encoded_again(tiny_sdxl: Path, prepared: Path, copy: Path) -> None:
    # A kill between the two writes leaves this; nobody can say whether the shard is what was written.
    flip_byte(copy / SHARDS[0])
    (copy / SHARDS[0]).with_suffix(".sha256").unlink()
    (copy / "index.json").unlink()
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == contents(prepared)


@pytest.mark.parametrize("name", ["pairs.npy", "rows.parquet"])
def test_damaged_table_of_a_finished_cache_is_made_anew(
    tiny_sdxl: Path, prepared: Path, copy: Path, name: str
) -> None:
    flip_byte(copy / name)
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == contents(prepared)


def test_fingerprint_is_of_the_content(tiny_sdxl: Path, prepared: Path, copy: Path) -> None:
    first = PairCache.open(prepared).fingerprint
    assert PairCache.open(copy).fingerprint == first, "not of the place"
    prepare(config(tiny_sdxl, prepared.parent / "s", copy, held_out=0.5))
    assert PairCache.open(copy).fingerprint != first


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


def test_ten_million_pairs_start_at_once_and_take_no_memory(tmp_path: Path) -> None:
    table = np.lib.format.open_memmap(tmp_path / "pairs.npy", "w+", PAIR, (10**7,))  # sparse on disk
    table["bucket"][4 * 10**6 :] = 64
    tracemalloc.start()
    begin = time.process_time()
    rows = PairRows(PairTable(tmp_path / "pairs.npy", ()), 5, 10**7)
    batches = MicroBatches(rows, 4, seed=0)
    found = [batches.at(position)[1] for position in (0, 10**6, 3 * 10**6)]
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches.per_epoch == -(-(4 * 10**6 - 5) // 4) + 6 * 10**6 // 4
    assert all(len(pairs) == 4 for pairs in found)
    assert rows[-1].index == 10**7 - 1
    assert seconds < 2
    assert peak < 10**6


def test_a_large_table_is_checked_piece_by_piece(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.load(copy / "pairs.npy")
    monkeypatch.setattr(cache_module, "PIECE", 4)
    digests = table_digests(table)
    path = copy / "pairs.npy"
    flip_byte(path)  # in the last piece
    checked = PairTable(path, digests)
    assert checked[3].tobytes() == table[3].tobytes()
    for _ in range(2):
        with pytest.raises(UserError, match=r"pairs\.npy is damaged"):
            checked[11]
    assert checked[7].tobytes() == table[7].tobytes()


def test_a_large_cache_is_checked_as_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "VERIFIED_AT_ONCE", 0)
    for name in (SHARDS[0], "rows.parquet"):
        flip_byte(copy / name)
    cache = PairCache.open(copy)
    with pytest.raises(UserError, match="latents-00000"):
        cache.batch(cache.train[:1], flip=None, drop=None)
    with pytest.raises(UserError, match="rows"):
        cache.rows(cache.train[:1])


def as_format(cache: Path, number: int, model: Path) -> None:
    """Turn a cache into what the version with this format wrote."""
    known = open_sdxl(model).fingerprint(ENCODERS)
    for name in ("index.json", "settings.json"):
        text = json.loads((cache / name).read_text())
        settings = text["settings"] if name == "index.json" else text
        settings |= {"format": number, "model": known}
        (cache / name).write_text(json.dumps(text))
    (cache / "pairs.npy").write_bytes(b"as that format had it")


@pytest.mark.parametrize("number", [2, 3])
def test_an_earlier_format_is_taken_over_without_encoding(
    tiny_sdxl: Path, prepared: Path, copy: Path, number: int
) -> None:
    run = config(tiny_sdxl, prepared.parent / "s", copy)
    as_format(copy, number, tiny_sdxl)
    index = json.loads((copy / "index.json").read_text())
    known = {name: index[name] for name in ("settings", "train", "files")}  # as runs of then know it
    with pytest.raises(UserError, match="of an earlier version whose latents can be kept: run mapo-fast"):
        PairCache.open(copy)
    before = {path: path.stat().st_mtime_ns for path in (copy / "shards").iterdir()}
    prepare(run)
    assert {path: path.stat().st_mtime_ns for path in (copy / "shards").iterdir()} == before
    have, want = contents(copy), contents(prepared)
    assert have.keys() == want.keys()
    assert {name for name in have if have[name] != want[name]} == {"index.json", "settings.json"}
    cache = PairCache.open(copy)
    cache.check(open_sdxl(tiny_sdxl), run.data)
    assert cache.fingerprint == hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    before_again = contents(copy)
    prepare(run)
    assert contents(copy) == before_again


def test_an_earlier_format_of_another_model_is_refused(
    tiny_sdxl: Path, prepared: Path, copy: Path, other_model: Callable[[str], Path]
) -> None:
    as_format(copy, 3, other_model("text_encoder_2"))
    with pytest.raises(UserError, match="made with another VAE, text encoder or tokenizer"):
        prepare(config(tiny_sdxl, prepared.parent / "s", copy))


def test_embeddings_of_an_earlier_format_that_are_not_finite_are_listed(
    tiny_sdxl: Path, prepared: Path, copy: Path
) -> None:
    as_format(copy, 3, tiny_sdxl)
    path = copy / "shards" / "text2-00001.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["pooled"][2, 5] = torch.nan
    tensors["hidden"][4, 3, 1] = torch.inf
    path.with_suffix(".sha256").write_text(
        f"{write_tensors(path, tensors, {'nan_retries': '0'})}  {path.name}\n"
    )
    summary = prepare(config(tiny_sdxl, prepared.parent / "s", copy, max_skipped=0.5))
    assert (summary.pairs, summary.skipped) == (10, {"non-finite embedding": 2})
    assert set(skipped(copy).values()) == {"non-finite embedding"}
    cache = PairCache.open(copy)
    batch = cache.batch([*cache.train], flip=None, drop=None)
    assert batch.prompt_embeds.isfinite().all()
    assert batch.pooled_embeds.isfinite().all()


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


def test_shard_folder_without_permission_is_not_taken_for_an_empty_one(
    tiny_sdxl: Path, prepared: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir

    def refusing(self: Path) -> Any:
        if self.name == "shards":
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    (copy / "index.json").unlink()
    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(UserError, match=r"^cannot write .*shards: Permission denied$"):
        prepare(config(tiny_sdxl, prepared.parent / "s", copy))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_an_index_that_is_no_file_is_named(prepared: Path, tmp_path: Path) -> None:
    """Without waiting for a writer."""
    cache = shutil.copytree(prepared, tmp_path / "c")
    (cache / "index.json").unlink()
    os.mkfifo(cache / "index.json")
    with pytest.raises(UserError, match=r"data\.cache .* cannot be read: it is a FIFO"):
        PairCache.open(cache)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ELOOP, 2), (errno.ENOENT, 2)]
)
def test_a_shard_that_is_gone_while_it_is_read_is_one_line(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    cache = PairCache.open(prepared, verify=False)

    def refusing(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("mapo_fast.data.cache.sha256_file", refusing)
    with pytest.raises(UserError, match=r"^data\.cache .* cannot be read: ") as caught:
        cache.batch([cache.train[0]], flip=None, drop=None)
    assert caught.value.exit_code == code
