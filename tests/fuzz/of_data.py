"""Caches, sources of preference data, and images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mapo_fast.data.cache import PairCache
from mapo_fast.data.images.decode import ImageProblemError, decode_image
from mapo_fast.data.prepare import prepare
from mapo_fast.data.scan import scan
from mapo_fast.data.sources.registry import open_source
from mapo_fast.models.open import open_sdxl
from tests.data.pair_sources import encoded, pickapic_rows, picture, write_parquet
from tests.fuzz import mutations
from tests.fuzz.judge import FoundError, judge
from tests.fuzz.kind import Kind
from tests.fuzz.of_runs import of_lines
from tests.training import make_cache, make_config, make_images, make_pairs


class Cache(Kind):
    """What `prepare` has written."""

    name, weight = "cache", 350

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.cache = make_cache(model, folder)
        self.config = make_config(model, self.cache, folder / "run")
        self.pipeline = open_sdxl(model)
        self.files = [path for path in self.cache.rglob("*") if path.is_file() and path.name != ".lock"]
        self.batch = self._read(PairCache.open(self.cache))

    def _read(self, cache: PairCache) -> Any:
        pairs = list(cache.train)
        return cache.batch(pairs[:3], flip=None, drop=[False, True, False]), cache.rows(list(cache.held_out))

    def case(self, random: Random) -> str:
        """Opened and read as training does."""
        path = random.choice(self.files)

        def call() -> None:
            cache = PairCache.open(self.cache, verify=random.choice((None, True, False)))
            cache.check(self.pipeline, self.config.data)
            batch, rows = self._read(cache)
            same = all(
                torch.equal(a, b)
                for a, b in zip(vars(batch).values(), vars(self.batch[0]).values(), strict=True)
            )
            if not same or rows != self.batch[1]:
                raise FoundError("a damaged cache gave other numbers")

        damage = mutations.of_json if path.suffix == ".json" else mutations.of_bytes
        return self.on(random, path, damage, call, names=(str(self.cache),), unchanged=self.cache)


class Prepare(Kind):
    """What `prepare` finds of an earlier one."""

    name, weight = "prepare", 40

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        source = make_pairs(folder / "source", 6)
        self.cache = folder / "cache"
        self.config = make_config(model, self.cache, folder / "run", data={"source": str(source)})
        prepare(self.config)
        self.fingerprint = PairCache.open(self.cache).fingerprint
        self.whole = shutil.copytree(self.cache, folder / "whole")

    def case(self, random: Random) -> str:
        """Done again over a damaged cache, in which only what is damaged is made anew: the same bytes."""
        files = sorted(path for path in self.cache.rglob("*") if path.is_file() and path.name != ".lock")
        path = random.choice(files)
        if random.randrange(3):
            (self.cache / "index.json").unlink()
        if path.exists():
            damage = mutations.of_json if path.suffix == ".json" else mutations.of_bytes
            data = damage(random, path.read_bytes())
            path.unlink()
            if random.randrange(6) == 0:
                mutations.special(random, path)
            else:
                path.write_bytes(data)

        def call() -> None:
            prepare(self.config)
            if PairCache.open(self.cache).fingerprint != self.fingerprint:
                raise FoundError("prepared anew, a cache is another one")

        try:
            return judge(call, (str(self.cache),), self.folder / "source")
        finally:
            mutations.remove(self.cache)
            shutil.copytree(self.whole, self.cache)


class Source(Kind):
    """Preference data in every layout."""

    name, weight = "source", 600

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.sources = self._make(folder / "sources")

    def _make(self, folder: Path) -> list[Path]:
        made = [make_pairs(folder / "jsonl", 4, 16, labelled=True), make_images(folder / "single", 3)]
        twins = folder / "twins"
        for half, seed in (("chosen", 0), ("rejected", 100)):
            (twins / half / "below").mkdir(parents=True)
            for index, name in enumerate(("a.png", "b.jpg", "below/c.webp", "below/d.tiff")):
                kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tiff": "TIFF"}[name.rpartition(".")[2]]
                (twins / half / name).write_bytes(encoded(picture(seed + index, 16, 16), kind))
                (twins / half / name).with_suffix(".txt").write_text("a red thing")
        made.append(twins)
        write_parquet(folder / "parquet" / "train-00000-of-00001.parquet", pickapic_rows(5), row_group=2)
        made.append(folder / "parquet")
        rows = [{"prompt": "a", "chosen": row["jpg_0"], "rejected": row["jpg_1"]} for row in pickapic_rows(3)]
        write_parquet(folder / "named" / "a.parquet", rows)
        made.append(folder / "named")
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(folder / "dataset")
        made.append(folder / "dataset")
        (folder / "arrow").mkdir()
        shutil.copy(next((folder / "dataset").glob("*.arrow")), folder / "arrow" / "a.arrow")
        made.append(folder / "arrow")
        return made

    def case(self, random: Random) -> str:
        """One file damaged, or something else done to the tree; then opened, identified and scanned."""
        source = random.choice(self.sources)
        files = sorted(path for path in source.rglob("*") if path.is_file())
        path = random.choice(files)

        def call() -> None:
            pairs = open_source(source)
            target = self.folder / "scan"
            target.mkdir()
            try:
                rows = scan(pairs, pairs.identity(), target, lambda done: None)
                for row in rows:
                    row.name.encode(), row.detail.encode(), row.prompt.encode()
                    if not np.isfinite(0.5 if row.label is None else row.label):
                        raise FoundError(f"label {row.label}")
            finally:
                shutil.rmtree(target)

        names = (str(source), "data.source", "/proc/")
        if random.randrange(4) == 0:
            return self._grown(random, source, path, call)
        damage = {".jsonl": of_lines, ".json": mutations.of_json}.get(path.suffix, mutations.of_bytes)
        return self.on(random, path, damage, call, names=names, unchanged=source, specials=5)

    def _grown(self, random: Random, source: Path, path: Path, call: Callable[[], Any]) -> str:
        """With one more entry of an odd name or kind."""
        odd = (
            "\x1b[31m", "a\nb.png", b"\xff.png".decode("utf-8", "surrogateescape"), "e\u0301.png",
            "x" * 250 + ".png",
            ".hidden.png", " .png", "a.PNG", "pairs.jsonl", "c.parquet", "state.json", "dataset_dict.json",
            "w", "l",
            "train-00001-of-00002.parquet", "test-00000-of-00001.parquet", "a.heic", "a.txt", "b.txt",
        )  # fmt: skip
        extra = path.parent / random.choice(odd)
        if os.path.lexists(extra):
            return judge(call, (str(source),), source)
        how = random.randrange(4)
        try:
            if how == 0:
                shutil.copy(path, extra)
            elif how == 1:
                extra.write_bytes(random.randbytes(100))
            elif how == 2:
                extra.symlink_to(random.choice((path, path.parent, source, "..", "/dev/zero", extra.name)))
            else:
                mutations.special(random, extra)
            return judge(call, (str(source), extra.name, "/proc/"), source)
        finally:
            mutations.remove(extra)


class Columns(Kind):
    """Parquet tables whose columns have any types and values."""

    name, weight = "columns", 250

    def case(self, random: Random) -> str:
        """A small table, opened and scanned."""
        folder = self.folder / "table"
        folder.mkdir()
        layout = random.choice(
            (("jpg_0", "jpg_1", "label_0", "label_1", "caption", "has_label"), ("prompt", "chosen",
            "rejected"),
             ("prompt", "image", "label"))
        )  # fmt: skip
        columns = {name: self._column(random, name) for name in layout}
        if random.randrange(8) == 0:
            columns.pop(random.choice(layout))
        if random.randrange(8) == 0:
            columns[random.choice(mutations.TEXTS)] = self._column(random, "x")
        pq.write_table(pa.table(columns), folder / "a.parquet")

        def call() -> None:
            pairs = open_source(folder)
            (self.folder / "scan").mkdir()
            try:
                for row in scan(pairs, pairs.identity(), self.folder / "scan", lambda done: None):
                    row.name.encode(), row.detail.encode(), row.prompt.encode()
            finally:
                shutil.rmtree(self.folder / "scan")

        try:
            return judge(call, (str(folder),), folder)
        finally:
            shutil.rmtree(folder)

    def _column(self, random: Random, name: str) -> Any:
        count = 3
        if random.randrange(3):
            seeds: dict[str, Any] = {
                "caption": "a red thing", "prompt": "a red thing", "has_label": True, "label": True,
                "label_0": 1.0, "label_1": 0.0,
            }  # fmt: skip
            return pa.array(
                [seeds.get(name, encoded(picture(7 + hash_of(name) + i, 8, 8))) for i in range(count)]
            )
        choices: tuple[Callable[[], Any], ...] = (
            lambda: pa.nulls(count),
            lambda: pa.array(["true", "", None]),
            lambda: pa.array([b"", b"\xff", None]),
            lambda: pa.array([0, 1, -1]),
            lambda: pa.array([2**64 - 1] * count, pa.uint64()),
            lambda: pa.array([float("nan"), float("inf"), 0.5]),
            lambda: pa.array([1.0, 0.0, 0.5], pa.float32()),
            lambda: pa.array([np.float16(0.5)] * count, pa.float16()),
            lambda: pa.array([[1, 2], [], None]),
            lambda: pa.array([[b"a"], [b"b", None], None]),
            lambda: pa.array([{"bytes": encoded(picture(1, 8, 8)), "path": "a.png"}] * count),
            lambda: pa.array([{"bytes": None, "path": p} for p in ("/etc/passwd", "../x\0", "a" * 300)]),
            lambda: pa.array([{"bytes": None, "path": p} for p in ("/dev/zero", "", None)],
            pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            lambda: pa.array([{"path": 3}] * count),
            lambda: pa.array([0, 10**15, -1], pa.timestamp("us")),
            lambda: pa.array([10**9, 0, None], pa.duration("s")),
            lambda: pa.array([0, 1, 2], pa.date32()),
            lambda: pa.array(["a", "b", "a"]).dictionary_encode(),
            lambda: pa.array([b"ab"] * count, pa.binary(2)),
            lambda: pa.array([b"ab"] * count, pa.large_binary()),
            lambda: pa.array(["x" * 100_000] * count, pa.large_string()),
            lambda: pa.array([[("k", 1)]] * count, pa.map_(pa.string(), pa.int64())),
            lambda: pa.array([True, False, None]),
        )  # fmt: skip
        return random.choice(choices)()


def hash_of(name: str) -> int:
    """Equal in every process."""
    return sum(name.encode())


class Images(Kind):
    """Image files of every format."""

    name, weight = "images", 3000

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        image = picture(3, 24, 20)
        kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")
        self.seeds = [encoded(image, kind) for kind in kinds if kind in _writable()]
        for mode in ("L", "P", "1", "RGBA", "LA", "I;16"):
            made = Image.new("I;16", (9, 7)) if mode == "I;16" else image.convert(mode)
            self.seeds.append(encoded(made))
        for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
            self.seeds.append(encoded(image, "TIFF", compression=compression))

    def case(self, random: Random) -> str:
        """Decoded, or a problem with a reason."""
        data = mutations.of_bytes(random, random.choice(self.seeds))
        try:
            image = decode_image(data)
        except ImageProblemError as problem:
            if not problem.reason or "\n" in problem.detail or " at 0x" in problem.detail:
                raise FoundError(f"reason {problem.reason!r}, detail {problem.detail!r}") from problem
            return "refused"
        except Exception as error:
            raise FoundError(f"{type(error).__name__}: {error}") from error
        if image.mode != "RGB":
            raise FoundError(f"mode {image.mode}")
        return "accepted"


def _writable() -> set[str]:
    Image.init()
    return set(Image.SAVE)
