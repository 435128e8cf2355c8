"""Preference pairs, or single images, from tables: Pick-a-Pic parquet files and Hugging Face datasets.

Parquet is read lazily: for each row group first the small columns, then, in small batches, the images of the
rows that are usable. An image column may hold bytes, or a Hugging Face `Image` feature (a struct of bytes and
path).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from mapo_fast.data.folder_pairs import read_image_file
from mapo_fast.data.pairs import (
    MissingImageError,
    PairRecord,
    PreferencePairs,
    SkippedRow,
    clean_prompt,
    wanted,
)
from mapo_fast.errors import UserError

IMAGE_ROWS = 16  # rows of images decoded from parquet at a time


class Verdict(NamedTuple):
    """What a row says: its prompt, the columns of its two images, and how sure the preference is."""

    prompt: str
    chosen: str | None
    rejected: str | None
    label: float | None


@dataclass(frozen=True)
class Columns:
    """Which columns a table has, and what a row of them means."""

    images: tuple[str, ...]
    small: tuple[str, ...]
    kind: Literal["ranked", "named", "single"]
    """Pick-a-Pic's columns, where labels say which image is chosen; chosen and rejected; or one image."""

    def judge(self, index: int, name: str, row: dict[str, Any]) -> Verdict | SkippedRow:
        """What a row says, or why it cannot be used."""
        if self.kind == "single":
            good = wanted(index, name, row["label"])
            prompt = clean_prompt(index, name, row["prompt"])
            for skipped in (good, prompt):
                if isinstance(skipped, SkippedRow):
                    return skipped
            chosen, rejected = ("image", None) if good else (None, "image")
            return Verdict(str(prompt), chosen, rejected, None)
        first, second = self.images
        if self.kind == "named":
            prompt = clean_prompt(index, name, row["prompt"])
            return prompt if isinstance(prompt, SkippedRow) else Verdict(prompt, first, second, None)
        labels = (row["label_0"], row["label_1"])
        if row.get("has_label") is False or None in labels:
            return SkippedRow(index, name, "no label")
        if labels == (0.5, 0.5):
            return SkippedRow(index, name, "tie")
        if not (0 <= labels[0] <= 1 and abs(sum(labels) - 1) < 1e-6):
            return SkippedRow(index, name, "bad label", f"label_0 = {labels[0]!r}, label_1 = {labels[1]!r}")
        prompt = clean_prompt(index, name, row["caption"])
        if isinstance(prompt, SkippedRow):
            return prompt
        chosen, rejected = (first, second) if labels[0] > labels[1] else (second, first)
        return Verdict(prompt, chosen, rejected, float(max(labels)))


def columns_of(names: Iterable[str], where: Path) -> Columns:
    """Recognise a table by its column names. Raises `UserError` naming what was looked for."""
    have = set(names)
    if {"jpg_0", "jpg_1", "label_0", "label_1", "caption"} <= have:
        small = ("label_0", "label_1", "caption", *(("has_label",) if "has_label" in have else ()))
        return Columns(("jpg_0", "jpg_1"), small, "ranked")
    if {"prompt", "chosen", "rejected"} <= have:
        return Columns(("chosen", "rejected"), ("prompt",), "named")
    if {"prompt", "image", "label"} <= have:
        return Columns(("image",), ("prompt", "label"), "single")
    raise UserError(
        f"{where} has the columns {', '.join(sorted(have))}; needed are jpg_0, jpg_1, label_0, label_1, "
        "caption (Pick-a-Pic), or prompt, chosen, rejected, or prompt, image, label (single images)"
    )


def image_bytes(value: Any) -> bytes:
    """The bytes of a cell of an image column. Raises `MissingImageError`."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return read_image_file(Path(value["path"]))
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise MissingImageError("no bytes in the image column")
    return value


def open_split(
    files: list[Path], source: Path, opener: Callable[[list[Path]], PreferencePairs]
) -> PreferencePairs:
    """Open the files of one split: all of them, or `train` where names like `train-00000-of-…` say so."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.match(r"(.+?)-\d+-of-\d+", file.name)
        splits.setdefault(match[1] if match else "", []).append(file)
    if len(splits) == 1:
        return opener(files)
    if "train" not in splits:
        names = ", ".join(sorted(f"{name}-*" if name else "unnumbered files" for name in splits))
        raise UserError(
            f"data.source {source} mixes {names}: move one split to its own folder and name that folder"
        )
    pairs = opener(splits["train"])
    pairs.note = f"{source} has the splits {', '.join(sorted(splits))}; train is used"
    return pairs


class ParquetPairs(PreferencePairs):
    """Parquet files, their rows numbered through."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._starts: list[int] = []  # first row number of each row group
        self._groups: list[tuple[Path, int, int]] = []  # file, row group in it, row in the file it starts at
        self._rows = 0
        columns = set()
        for path in paths:
            with _parquet(path) as file:
                columns.add(columns_of(file.schema_arrow.names, path))
                row = 0
                for group in range(file.num_row_groups):
                    self._starts.append(self._rows)
                    self._groups.append((path, group, row))
                    count = file.metadata.row_group(group).num_rows
                    self._rows, row = self._rows + count, row + count
        if len(columns) > 1:
            raise UserError(f"the parquet files in {paths[0].parent} do not have the same columns")
        self.columns: Columns = columns.pop()
        self.paired = self.columns.kind != "single"

    def __len__(self) -> int:
        """Rows in all files."""
        return self._rows

    def files(self) -> Iterable[Path]:
        """The parquet files."""
        return self.paths

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        position = 0
        while position < len(rows):
            group = bisect_right(self._starts, rows[position]) - 1
            start = self._starts[group]
            end = self._starts[group + 1] if group + 1 < len(self._starts) else self._rows
            stop = position
            while stop < len(rows) and rows[stop] < end:
                stop += 1
            yield from self._read_group(group, [row - start for row in rows[position:stop]])
            position = stop

    def _read_group(self, group: int, wanted: list[int]) -> Iterator[PairRecord | SkippedRow]:
        path, number, row_in_file = self._groups[group]
        with _parquet(path) as file:
            try:
                small = file.read_row_group(number, columns=list(self.columns.small)).to_pylist()
                judged = {}
                for row in wanted:
                    name = f"{path.name}:{row_in_file + row}"
                    judged[row] = name, self.columns.judge(self._starts[group] + row, name, small[row])
                usable = [row for row in wanted if not isinstance(judged[row][1], SkippedRow)]
                images = self._images(file, number, usable)
                for row in wanted:
                    name, verdict = judged[row]
                    if isinstance(verdict, SkippedRow):
                        yield verdict
                    else:
                        yield _record(self._starts[group] + row, name, verdict, next(images))
            except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error

    def _images(self, file: Any, group: int, rows: list[int]) -> Iterator[dict[str, Any]]:
        """The image cells of `rows` of a row group, one dict per row; `IMAGE_ROWS` in memory."""
        if not rows:
            return
        pending, start = iter(rows), 0
        row = next(pending)
        for batch in file.iter_batches(IMAGE_ROWS, row_groups=[group], columns=list(self.columns.images)):
            while start <= row < start + batch.num_rows:
                yield batch.slice(row - start, 1).to_pylist()[0]
                row = next(pending, -1)
            start += batch.num_rows


class DatasetPairs(PreferencePairs):
    """A `datasets.Dataset`, memory-mapped from disk."""

    def __init__(self, dataset: Any, where: Path) -> None:
        from datasets import Image

        self.columns = columns_of(dataset.column_names, where)
        self.paired = self.columns.kind != "single"
        for column in self.columns.images:
            if isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        self._small = dataset.select_columns(list(self.columns.small))
        self._dataset, self._where = dataset.select_columns(list(self.columns.images)), where
        self._files = [Path(entry["filename"]) for entry in dataset.cache_files]

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self._small)

    def files(self) -> Iterable[Path]:
        """Its arrow files."""
        return self._files

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        for index in rows:
            name = f"{self._where.name}:{index}"
            verdict = self.columns.judge(index, name, self._small[index])
            if isinstance(verdict, SkippedRow):
                yield verdict
            else:
                yield _record(index, name, verdict, self._dataset[index])


def open_saved_dataset(folder: Path) -> PreferencePairs:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds for damaged folders
        raise UserError(f"data.source {folder} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, DatasetDict):
        return DatasetPairs(loaded, folder)
    if len(loaded) == 1:
        return DatasetPairs(next(iter(loaded.values())), folder)
    if "train" not in loaded:
        names = ", ".join(sorted(loaded))
        raise UserError(f"data.source {folder} has the splits {names}: name the folder of one of them")
    pairs = DatasetPairs(loaded["train"], folder)
    pairs.note = f"{folder} has the splits {', '.join(sorted(loaded))}; train is used"
    return pairs


def open_arrow_files(files: list[Path]) -> PreferencePairs:
    """Arrow files of one data set without its metadata, as in the `datasets` cache."""
    from datasets import Dataset, concatenate_datasets

    try:
        return DatasetPairs(concatenate_datasets([Dataset.from_file(str(f)) for f in files]), files[0].parent)
    except (ArrowInvalid, OSError, ValueError) as error:
        raise UserError(f"{files[0].parent}: {str(error).splitlines()[0]}") from error


def _parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _record(index: int, name: str, verdict: Verdict, cells: dict[str, Any]) -> PairRecord:
    chosen, rejected = (
        None if column is None else partial(_read_cell, cells, column)
        for column in (verdict.chosen, verdict.rejected)
    )
    return PairRecord(index, name, verdict.prompt, chosen, rejected, verdict.label)


def _read_cell(cells: dict[str, Any], column: str) -> bytes:
    return image_bytes(cells[column])
