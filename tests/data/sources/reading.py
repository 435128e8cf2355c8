"""What the tests of the layouts share: the rows of a source, read."""

from pathlib import Path

from mapo_fast.data.sources.base import PairRecord, SkippedRow
from mapo_fast.data.sources.registry import open_source


def read(source: Path) -> list[PairRecord | SkippedRow]:
    pairs = open_source(source)
    rows = []
    for row in pairs.read(range(len(pairs))):
        if isinstance(row, PairRecord):  # getters are valid until the next row
            chosen, rejected = row.chosen(), row.rejected()
            row = PairRecord(
                row.index,
                row.name,
                row.prompt,
                lambda c=chosen: c,
                lambda r=rejected: r,  # type: ignore[misc]
            )
        rows.append(row)
    assert [row.index for row in rows] == list(range(len(pairs)))
    return rows


def good(row: PairRecord | SkippedRow) -> tuple[str, bytes, bytes]:
    assert isinstance(row, PairRecord), row
    return row.prompt, row.chosen(), row.rejected()


def reasons(source: Path) -> list[str]:
    return [row.reason if isinstance(row, SkippedRow) else "" for row in read(source)]
