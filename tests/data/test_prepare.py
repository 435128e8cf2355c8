"""`mapo-fast prepare` from end to end: disk, running again, mistakes, interruptions."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.data import prepare as prepare_module
from mapo_fast.data import shards, vae_encoder
from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    contents,
    jsonl_folder,
    pickapic_rows,
    png,
    skipped,
    snapshot,
    write_jsonl,
    write_parquet,
)
from tests.data.preparing import counting_images, said


@pytest.mark.slow
def test_every_layout_gives_the_same_pairs(tiny_sdxl: Path, tmp_path: Path) -> None:
    rows = pickapic_rows(3)
    write_parquet(tmp_path / "parquet" / "a.parquet", rows)
    twin, table = tmp_path / "twin", []
    for i, row in enumerate(rows):
        best, worst = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        for name, column in (("chosen", best), ("rejected", worst)):
            (twin / name).mkdir(parents=True, exist_ok=True)
            (twin / name / f"{i}.png").write_bytes(row[column])
        (twin / "chosen" / f"{i}.txt").write_text(row["caption"])
        table.append({"prompt": row["caption"], "chosen": f"chosen/{i}.png", "rejected": f"rejected/{i}.png"})
    ids = []
    for number, source in enumerate(("parquet", "twin", "twin")):
        if number == 2:
            write_jsonl(twin, table)
        cache = tmp_path / f"c{number}"
        prepare(config(tiny_sdxl, tmp_path / source, cache, held_out=0.0))
        ids.append([pair.id for pair in PairCache.open(cache).train])
    assert len(set(ids[0])) == 3
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.slow
def test_too_many_skipped_stops_before_encoding(tiny_sdxl: Path, tmp_path: Path) -> None:
    rows = [*pickapic_rows(7), *pickapic_rows(2, label_0=0.5, label_1=0.5), *pickapic_rows(1, caption="")]
    source = write_parquet(tmp_path / "a.parquet", rows)
    cache = tmp_path / "c"
    with pytest.raises(UserError) as error:
        prepare(config(tiny_sdxl, source, cache, max_skipped=0.29))
    text = str(error.value)
    assert "30% of 10 rows" in text
    assert "2 × tie" in text
    assert "1 × empty caption" in text
    assert str(cache / "skipped.jsonl") in text
    assert len(skipped(cache)) == 3
    assert not list((cache / "shards").iterdir())
    assert prepare(config(tiny_sdxl, source, cache, max_skipped=0.3)).pairs == 7, "the limit may be raised"


def test_nothing_usable(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", pickapic_rows(2, label_0=0.5, label_1=0.5))
    with pytest.raises(UserError, match=r"no usable pair \(2 × tie\)"):
        prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=1.0))


@pytest.mark.slow
def test_disk_need_is_printed_first(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 10)
    _, text = said(config(tiny_sdxl, source, tmp_path / "c"))
    need = text.index("disk need: ")
    assert "20 images" in text[need:]
    assert "10 prompts" in text[need:]
    assert need < text.index("images ━")


def test_too_little_disk_space_stops_before_encoding(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    source = jsonl_folder(tmp_path / "s", 4)
    with pytest.raises(UserError, match=r"needs \d+ kB more in .*, only 1 kB are free"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))
    assert not list((tmp_path / "c" / "shards").iterdir())


@pytest.mark.slow
def test_finished_cache_is_left_alone(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    first = prepare(run)
    before = contents(tmp_path / "c")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")}
    again, text = said(run)
    assert "complete already: 6 pairs, nothing to do" in text
    assert contents(tmp_path / "c") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")} == times
    assert again.seconds < first.seconds
    assert again.__dict__ | {"seconds": 0, "encoded": 0} == first.__dict__ | {"seconds": 0, "encoded": 0}


def test_source_is_needed(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = config(tiny_sdxl, tmp_path / "s", tmp_path / "c")
    with pytest.raises(UserError, match=r"data\.source not found"):
        prepare(run)
    with pytest.raises(UserError, match=r"data\.source is missing"):
        prepare(run.model_copy(update={"data": run.data.model_copy(update={"source": None})}))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_new_pairs_reuse_what_is_encoded(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    prepare(run)
    before = contents(tmp_path / "c" / "shards")
    rows = (source / "pairs.jsonl").read_text().splitlines()
    for name in "xy":
        (source / f"{name}.png").write_bytes(png(ord(name)))
    write_jsonl(source, [{"prompt": "new", "chosen": "x.png", "rejected": "y.png"}, *rows[::-1]])
    with counting_images() as counts:
        assert prepare(run).pairs == 7
    assert sum(counts) == 2
    after = contents(tmp_path / "c" / "shards")
    assert {name: after[name] for name in before} == before
    cache = PairCache.open(tmp_path / "c")
    assert len(cache.batch(cache.train, flip=None, drop=None).chosen_latents) == len(cache.train)


@pytest.mark.slow
def test_a_run_that_stops_early_leaves_a_finished_cache_usable(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    prepare(run)
    for i in range(3):
        (source / f"{i}w.png").write_bytes(b"")
    with pytest.raises(UserError, match="3 × zero-byte image"):
        prepare(run)
    assert len(PairCache.open(tmp_path / "c").train) == 5


def test_cache_inside_the_source_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 3)
    before = contents(source)
    with pytest.raises(UserError, match=r"data\.cache .* lies inside data\.source"):
        prepare(config(tiny_sdxl, source, source / "cache"))
    assert contents(source) == before


def test_bad_rows_do_not_stop_the_others(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    rows = (source / "pairs.jsonl").read_text().splitlines()
    ok = json.loads(rows[0])
    bad = [
        ok | {"prompt": "\ud83d"},
        ok | {"chosen": "\ud800\0"},
        ok | {"rejected": "y" * 300},
        "[" * 100_000,
    ]
    write_jsonl(source, [*rows, *bad])
    assert prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.5)).pairs == 4
    assert skipped(tmp_path / "c") == {
        "pairs.jsonl:5": "bad caption",
        "pairs.jsonl:6": "missing image",
        "pairs.jsonl:7": "missing image",
        "pairs.jsonl:8": "bad line",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not Unicode")
def test_file_names_that_are_not_unicode(tiny_sdxl: Path, tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / "s" / side).mkdir(parents=True)
        (tmp_path / "s" / side / "a\udcff.png").write_bytes(png(len(side)))
    (tmp_path / "s" / "chosen" / "a\udcff.txt").write_text("red")
    prepare(config(tiny_sdxl, tmp_path / "s", tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    assert cache.rows(cache.train)[0].name == r"chosen/a\udcff"


@pytest.mark.parametrize("place", ["below a file", "a file's name too long", "/proc"])
def test_cache_where_none_can_be(tiny_sdxl: Path, tmp_path: Path, place: str) -> None:
    if place == "/proc" and sys.platform != "linux":
        pytest.skip("only Linux has /proc")
    source = jsonl_folder(tmp_path / "s", 3)
    (tmp_path / "file").write_text("")
    places = {"below a file": tmp_path / "file", "/proc": Path("/proc")}
    parent = places.get(place, tmp_path / ("x" * 300))
    with pytest.raises(UserError) as error:
        prepare(config(tiny_sdxl, source, parent / "c"))
    assert str(error.value).startswith(f"cannot write {parent / 'c'}: ")
    assert "\n" not in str(error.value)


def test_read_only_cache(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    source = jsonl_folder(tmp_path / "s", 3)
    mkdir = Path.mkdir

    def refusing(self: Path, *args: Any, **options: Any) -> None:
        if self.name == "shards":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(UserError, match=r"^cannot write .*c: Read-only file system \(.*shards\)$"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))


def test_second_prepare_of_a_cache_is_refused(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tiny_sdxl, jsonl_folder(tmp_path / "s", 4), tmp_path / "c")
    choose = prepare_module.choose
    seen = []

    def meanwhile(*args: Any) -> Any:
        before = contents(tmp_path / "c")
        with pytest.raises(UserError, match="in use by another mapo-fast process"):
            prepare(run)
        assert contents(tmp_path / "c") == before
        seen.append(True)
        return choose(*args)

    monkeypatch.setattr(prepare_module, "choose", meanwhile)
    assert prepare(run).pairs == 4
    assert seen == [True]


@pytest.mark.slow
def test_interrupt_keeps_what_is_finished(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    source = jsonl_folder(tmp_path / "s", 8)
    run = config(tiny_sdxl, source, tmp_path / "c", batch_size=2)
    prepare(config(tiny_sdxl, source, tmp_path / "whole", batch_size=2))
    start = vae_encoder.LatentEncoder.start
    calls = 0

    def interrupted(self: Any, images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return start(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(vae_encoder.LatentEncoder, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(run)
    kept = contents(tmp_path / "c" / "shards")
    assert len([name for name in kept if name.endswith(".safetensors")]) >= 1
    assert not list((tmp_path / "c").rglob("*.tmp"))
    prepare(run)
    whole = contents(tmp_path / "whole")
    assert {f"shards/{name}" for name in kept} < set(whole)
    assert contents(tmp_path / "c") == whole


@pytest.mark.slow
def test_models_and_data_in_the_cache_of_the_hub(tmp_path: Path, tiny_sdxl: Path) -> None:
    try:
        (tmp_path / "probe").symlink_to(tmp_path)
    except OSError:
        pytest.skip("this system does not allow symbolic links")
    model = shutil.copytree(tiny_sdxl, tmp_path / "hub" / "model" / "snapshots" / "1")
    plain = prepare(config(tiny_sdxl, jsonl_folder(tmp_path / "s", 3), tmp_path / "a", held_out=0.0))
    source = snapshot(jsonl_folder(tmp_path / "hub" / "data" / "snapshots", 3))
    linked = prepare(config(snapshot(model), source, tmp_path / "b", held_out=0.0))
    assert (linked.pairs, linked.images) == (plain.pairs, plain.images) == (3, 6)
    first, second = (contents(tmp_path / name / "shards") for name in "ab")
    assert first == second


SHARD_BYTES = 9000  # a few items each
PART_ROWS = 5
SETTINGS = {"flip": True, "held_out": 0.2, "batch_size": 3}

SCRIPT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from mapo_fast.data import prepare, scan, shards
from tests.data import test_prepare
from tests.data.pair_sources import config

model, source, whole, cut = map(Path, sys.argv[1:])
shards.SHARD_BYTES, scan.PART_ROWS = test_prepare.SHARD_BYTES, test_prepare.PART_ROWS
prepare.prepare(config(model, source, whole, **test_prepare.SETTINGS))
# All imports are done, once for all children: they are forked.
run = config(model, source, cut, **test_prepare.SETTINGS)
replace, count, kill_at, status = Path.replace, 0, 0, signal.SIGKILL

def passing_a_moment():
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def killing_replace(self, target):
    passing_a_moment()  # the file is written but not yet in place
    out = replace(self, target)
    passing_a_moment()  # it has just come into place
    return out

Path.replace = killing_replace
while status == signal.SIGKILL:
    kill_at += 1 if kill_at < 4 else 3  # odd and even: before and after a file comes into place
    if (pid := os.fork()) == 0:
        try:
            prepare.prepare(run)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]  # the signal, or 256 × the exit code
    print(status, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no fork")
def test_killed_at_any_moment_it_continues(tiny_sdxl: Path, tmp_path: Path) -> None:
    """The n-th start is killed at its n-th moment, until one gets through."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        tiny_sdxl,
        jsonl_folder(tmp_path / "s", 14, prompts=12),
        whole,
        cut,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    *killed, last = map(int, done.stdout.split())
    assert last == 0, done.stderr
    assert killed == [signal.SIGKILL] * len(killed)
    assert len(killed) >= 8
    expected = contents(whole)
    assert len([name for name in expected if name.startswith("shards/latents")]) >= 3
    assert contents(cut) == expected
    PairCache.open(cut)
