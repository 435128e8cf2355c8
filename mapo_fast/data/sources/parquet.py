"""Preference pairs, or single images, from one parquet file or a folder of them.

It takes little memory however large a row group is.

The small columns of a row group are read in one pass from front to back and the images of its usable rows in
another. A read that follows the last one goes on where that ended. Columns are read page by page through
buffers of `BUFFER_BYTES`, never as whole column chunks. What is held is about `BATCH_BYTES` of rows and up to
three times a page of each image column (its dictionary twice and the page). Pages are as large as the writer
made them: pyarrow's hold up to `PAGE_ROWS` images.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapo_fast.data.sources.base import PairRecord, PreferencePairs, SkippedRow
from mapo_fast.data.sources.listing import Entry, Folder, found_in, list_files
from mapo_fast.data.sources.tables import (
    Columns,
    cell,
    columns_of,
    first_line,
    has_tables,
    is_text,
    open_split,
    paths_of,
    record,
    tables,
)
from mapo_fast.util.errors import UserError, printable
from mapo_fast.util.files import os_error

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER_BYTES = 1 << 20
BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024
PAGE_ROWS = 1024
LARGE = 2 << 30
"""Bytes of memory for reading from which the user is told."""


class _Pass:
    """Some columns of one row group, read once from front to back."""

    def __init__(self, path: Path, group: int, columns: Sequence[str]) -> None:
        self._file = _parquet(path)
        metadata = self._file.metadata.row_group(group)
        size = max(1, _size(metadata, columns))
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // size))
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=list(columns))
        self._batch: pa.RecordBatch | None = None
        self.start = 0
        """First row that can still be read."""

    def row(self, row: int) -> pa.RecordBatch:
        """The row with this number, which is not before `start`."""
        import pyarrow as pa

        while self._batch is None or row >= self.start + self._batch.num_rows:
            self.start += 0 if self._batch is None else self._batch.num_rows
            self._batch = None  # before the next one is made
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise pa.ArrowInvalid(f"a row group ends at its row {self.start}")
        return self._batch.slice(row - self.start, 1)

    def close(self) -> None:
        self._batch = self._batches = None
        self._file.close()


class ParquetPairs(PreferencePairs):
    """Parquet files, their rows numbered through."""

    looked_for = "*.parquet"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A file by its suffix; a folder with such files anywhere in it."""
        if path.is_dir():
            return has_tables(list_files(path), ".parquet")
        return path.suffix.lower() == ".parquet"

    @classmethod
    def open(cls, path: Path) -> ParquetPairs:
        """See `PreferencePairs.open`."""
        if path.is_dir():
            return open_split(tables(list_files(path), ".parquet"), path, cls)
        return cls([Entry(path.name, Path(os.path.realpath(path)))], path.parent)

    def __init__(self, files: list[Entry], root: Path) -> None:
        self._files, self._folder = files, Folder(root)
        self._starts: list[int] = []  # first row number of each row group
        self._groups: list[tuple[Entry, int, int]] = []  # file, row group in it, row in the file it starts at
        self._rows = 0
        self._passes: dict[tuple[int, Sequence[str]], _Pass] = {}
        columns = set()
        most, largest = 0, ""
        for file in files:
            with _readable(file.path), _parquet(file.path) as table:
                found = columns_of(table.schema_arrow.names, file.path)
                columns.add(found)
                row = 0
                for group in range(table.num_row_groups):
                    self._starts.append(self._rows)
                    self._groups.append((file, group, row))
                    metadata = table.metadata.row_group(group)
                    count = metadata.num_rows
                    self._rows, row = self._rows + count, row + count
                    held = 3 * _size(metadata, found.images) * min(count, PAGE_ROWS) // max(1, count)
                    if held > most:
                        most, largest = held, file.name
        if most > LARGE:
            self.note = (
                f"reading {largest} takes up to {most / 1e9:.1f} GB of memory, as its row groups are large: "
                "less when it is written again with pyarrow's row_group_size=100"
            )
        if len(columns) > 1:
            raise UserError(f"the parquet files in {root} do not have the same columns")
        self.columns: Columns = columns.pop()
        self.paired = self.columns.kind != "single"

    def __len__(self) -> int:
        """Rows in all files."""
        return self._rows

    def files(self) -> Iterable[Path]:
        """The parquet files, and the images that they name."""
        for file in self._files:
            yield file.path
            with _readable(file.path), _parquet(file.path) as table:
                for group in range(table.num_row_groups):
                    if columns := self._path_columns(table, group):
                        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                            for column in batch.columns:
                                yield from found_in(self._folder, paths_of(column))

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        passes, self._passes = self._passes, {}  # of the last read; another one may run next to this one
        for index in rows:
            group = bisect_right(self._starts, index) - 1
            file, _, start_in_file = self._groups[group]
            row = index - self._starts[group]
            name = f"{file.name}:{start_in_file + row}"
            with _readable(file.path):
                for other in [key for key in passes if key[0] != group]:
                    passes.pop(other).close()
                small = self._row(passes, group, self.columns.small, row)
                cells = {key: cell(small.column(key)[0]) for key in self.columns.small}
                verdict = self.columns.judge(index, name, cells, self.default_caption)
                if isinstance(verdict, SkippedRow):
                    found: PairRecord | SkippedRow = verdict
                else:
                    images = self._row(passes, group, self.columns.images, row)
                    found = record(index, name, verdict, images, self._folder)
            yield found
            if index == self._rows - 1:
                for one in passes.values():
                    one.close()
                passes.clear()
        self._passes = passes

    def _row(self, passes: dict[Any, _Pass], group: int, columns: Sequence[str], row: int) -> pa.RecordBatch:
        """One row of a row group."""
        key = (group, columns)
        if key in passes and row < passes[key].start:
            passes.pop(key).close()
        if key not in passes:
            file, number, _ = self._groups[group]
            passes[key] = _Pass(file.path, number, columns)
        return passes[key].row(row)

    def _path_columns(self, table: Any, group: int) -> list[str]:
        """The parts of image columns that hold paths: a column, or `column.path` where bytes are missing."""
        metadata = table.metadata.row_group(group)
        leaves = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
        found = []
        for name in self.columns.images:
            held = leaves.get(f"{name}.bytes")
            whole = held and held.statistics and held.statistics.null_count == 0
            if f"{name}.path" in leaves and not whole:
                found.append(f"{name}.path")
            elif name in leaves and is_text(table.schema_arrow.field(name).type):
                found.append(name)
        return found


def _size(group: Any, columns: Sequence[str]) -> int:
    """Bytes of these columns in a row group, uncompressed."""
    leaves = map(group.column, range(group.num_columns))
    return sum(
        leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] in columns
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors about a file into one line."""
    import pyarrow as pa

    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise os_error(error, f"read {path}") from error
        raise _damaged(path, error) from error
    except (pa.ArrowException, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a readable parquet file: {printable(first_line(error))}")


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
