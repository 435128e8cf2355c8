"""Preference pairs, or single images, from a Hugging Face dataset: saved to disk, or a folder of arrow files.

A dataset with several splits is read as its `train` split, and says so in `note`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, SkippedRow
from mapo_fast.data.sources.listing import Entry, Folder, found_in, list_files
from mapo_fast.data.sources.tables import (
    cell,
    columns_of,
    first_line,
    has_tables,
    listed,
    open_split,
    paths_of,
    record,
    tables,
)
from mapo_fast.util.errors import UserError, shown
from mapo_fast.util.files import read_json, unreadable

if TYPE_CHECKING:
    import pyarrow as pa

    _Part = TypeVar("_Part", pa.Table, pa.Array)


class DatasetPairs(PreferencePairs):
    """A `datasets.Dataset`, memory-mapped from disk."""

    looked_for = "a Hugging Face dataset (state.json or *.arrow)"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A saved dataset; or arrow files, unless parquet files are next to them, which are then the data."""
        if not path.is_dir():
            return False
        if _is_saved(path):
            return True
        files = list_files(path)
        return has_tables(files, ".arrow") and not has_tables(files, ".parquet")

    @classmethod
    def open(cls, path: Path) -> DatasetPairs:
        """See `PreferencePairs.open`."""
        if _is_saved(path):
            return _open_saved(path)
        return open_split(tables(list_files(path), ".arrow"), path, _open_arrow_files)

    def __init__(self, dataset: Any, where: Path, root: Path) -> None:
        self.columns = columns_of(dataset.column_names, where)
        self.paired = self.columns.kind != "single"
        dataset = dataset.with_format("arrow")
        self._small = dataset.select_columns(list(self.columns.small))
        self._images = dataset.select_columns(list(self.columns.images))
        self._where, self._folder = where, Folder(root)
        self._files = [Path(entry["filename"]) for entry in dataset.cache_files]

    def __len__(self) -> int:
        """Number of rows of the data set."""
        return len(self._small)

    def files(self) -> Iterable[Path]:
        """The arrow files, and the images that they name."""
        yield from self._files
        for column in self.columns.images:
            for chunk in self._images.data.column(column).chunks:
                yield from found_in(self._folder, paths_of(self._whole(chunk)))

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        for index in rows:
            name = f"{self._where.name}:{index}"
            row = self._whole(self._small[index])
            small = {key: cell(row[key][0]) for key in self.columns.small}
            verdict = self.columns.judge(index, name, small, self.default_caption)
            if isinstance(verdict, SkippedRow):
                yield verdict
            else:
                yield record(index, name, verdict, self._whole(self._images[index]), self._folder)

    def _whole(self, part: _Part) -> _Part:
        """A part of the data with its offsets checked: what is mapped is not, and Arrow would crash."""
        import pyarrow as pa

        try:
            for column in part.columns if isinstance(part, pa.Table) else [part]:
                for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                    _check_offsets(chunk)
        except pa.ArrowException as error:
            raise UserError(f"data.source {self._where} is damaged: {first_line(error)}") from error
        return part


def _check_offsets(array: pa.Array) -> None:
    """Raise `pa.ArrowInvalid` where an array's offsets lead out of its data.

    Text that is not UTF-8 passes: that is one row's defect.
    """
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        array.validate()
        for field in array.flatten():
            _check_offsets(field)
    elif pa.types.is_string(array.type):
        array.view(pa.binary()).validate(full=True)
    elif pa.types.is_large_string(array.type):
        array.view(pa.large_binary()).validate(full=True)
    else:
        array.validate(full=True)


def _is_saved(folder: Path) -> bool:
    """Whether a path is a folder that `datasets` saved."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _open_saved(folder: Path) -> DatasetPairs:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        UserError: damaged, or of several splits without one called `train`.
    """
    if (folder / "state.json").is_file():
        return _saved(folder, folder)
    where = folder / "dataset_dict.json"
    splits = read_json(where).get("splits")
    if not isinstance(splits, list) or not all(
        isinstance(split, str) and PurePosixPath(split).name == split for split in splits
    ):
        raise UserError(f"{where} has splits = {shown(splits)}: needed is a list of folder names")
    if len(splits) != 1 and "train" not in splits:
        raise UserError(
            f"data.source {folder} has the splits {listed(splits)}: name the folder of one of them"
        )
    pairs = _saved(folder / ("train" if "train" in splits else splits[0]), folder)
    if len(splits) > 1:
        pairs.note = f"{folder} has the splits {listed(splits)}; train is used"
    return pairs


def _saved(folder: Path, source: Path) -> DatasetPairs:
    """One saved dataset, its files checked to be regular ones of its own folder."""
    from datasets import load_from_disk

    where = folder / "state.json"
    state = read_json(where)
    for key in ("_data_files", "_indices_data_files"):
        files = state.get(key) or []
        if not isinstance(files, list):
            raise UserError(f"{where} has {key} = {shown(files)}: needed is a list of files")
        for file in files:
            name = file.get("filename") if isinstance(file, dict) else file
            try:
                if not isinstance(name, str):
                    raise MissingImageError(f"{shown(name)} is no file name")
                Folder(folder).find(name)
            except MissingImageError as error:
                raise UserError(f"{where} names a file that cannot be used in {key}: {error}") from None
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds for damaged folders
        raise _damaged(source, error) from error
    return DatasetPairs(dataset, folder, source)


def _open_arrow_files(files: list[Entry], source: Path) -> DatasetPairs:
    """Arrow files of one data set without its metadata, as in the `datasets` cache."""
    from datasets import Dataset, concatenate_datasets

    try:
        dataset = concatenate_datasets([Dataset.from_file(str(file.path)) for file in files])
    except Exception as error:  # as above
        raise _damaged(source, error) from error
    return DatasetPairs(dataset, source, source)


def _damaged(source: Path, error: Exception) -> UserError:
    if isinstance(error, OSError):
        return unreadable(f"data.source {source}", error)
    return UserError(f"data.source {source} cannot be read: {first_line(error)}")
