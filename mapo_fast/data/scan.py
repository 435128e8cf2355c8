"""The first pass over a source: every image is read, decoded and hashed once; nothing is encoded yet.

So all defects, the disk need and the share of skipped rows are known before hours of encoding begin. The
result is kept in the cache folder in parts of `PART_ROWS` rows, named by the source's identity; a killed scan
continues after its last part, and a changed source is scanned again, as are the rows of a damaged part.
`FORMAT` counts the ways images were decoded: parts of an older format are scanned again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageStat

from mapo_fast.data.buckets import Size
from mapo_fast.data.images.colour import Profile
from mapo_fast.data.images.decode import ImageProblemError, decode
from mapo_fast.data.leak import BLACK, COLOUR, MADE, UNKNOWN, Colour, Made
from mapo_fast.data.picture_origin import made_with
from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, SkippedRow
from mapo_fast.util.files import atomic_path, disk_errors, open_regular

FORMAT = 3
PART_ROWS = 1000

_COLOUR_SIDE = 32
"""Least side of the copy of an image that its mean colour is taken from."""

ABSENT = bytes(16)
"""Hash of the half that a single image does not have."""


@dataclass(frozen=True)
class ScannedRow:
    """Facts about a row; `reason` is empty for a usable one."""

    index: int
    name: str
    prompt: str
    chosen_hash: bytes  # first 16 bytes of the SHA-256 of the file; `ABSENT` where there is none
    rejected_hash: bytes
    chosen_size: Size  # of a single image both have its size
    rejected_size: Size
    reason: str = ""
    detail: str = ""
    label: float | None = None
    chosen_profile: Profile = ""
    rejected_profile: Profile = ""
    chosen_made: Made = UNKNOWN
    rejected_made: Made = UNKNOWN
    chosen_colour: Colour = BLACK
    rejected_colour: Colour = BLACK

    @property
    def images(self) -> dict[str, tuple[bytes, Size]]:
        """Hash and size of the row's images, by half."""
        halves = {
            "chosen": (self.chosen_hash, self.chosen_size),
            "rejected": (self.rejected_hash, self.rejected_size),
        }
        return {half: image for half, image in halves.items() if image[0] != ABSENT}

    @property
    def profiles(self) -> dict[str, Profile]:
        """Outcomes of the images' colour profiles, by half."""
        profiles = {"chosen": self.chosen_profile, "rejected": self.rejected_profile}
        return {half: profiles[half] for half in self.images}

    @property
    def made(self) -> dict[str, Made]:
        """What made the row's images, by half."""
        made = {"chosen": self.chosen_made, "rejected": self.rejected_made}
        return {half: made[half] for half in self.images}

    @property
    def colours(self) -> dict[str, Colour]:
        """Means of the images' pixels, by half."""
        colours = {"chosen": self.chosen_colour, "rejected": self.rejected_colour}
        return {half: colours[half] for half in self.images}


_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("name", pa.string()),
        ("prompt", pa.string()),
        ("chosen_hash", pa.binary()),
        ("rejected_hash", pa.binary()),
        ("chosen_size", pa.list_(pa.int32(), 2)),
        ("rejected_size", pa.list_(pa.int32(), 2)),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("label", pa.float64()),
        ("chosen_profile", pa.string()),
        ("rejected_profile", pa.string()),
        *((f"{half}_made", pa.list_(pa.string(), len(MADE))) for half in ("chosen", "rejected")),
        *((f"{half}_colour", pa.list_(pa.float64(), len(COLOUR))) for half in ("chosen", "rejected")),
    ]
)


def content_hash(data: bytes) -> bytes:
    """16 bytes that identify a file's content."""
    return hashlib.sha256(data).digest()[:16]


def scan(
    source: PreferencePairs, identity: str, folder: Path, progress: Callable[[int], None]
) -> list[ScannedRow]:
    """Scan all rows of `source`, reusing finished parts in `folder`; `progress` is told rows done.

    Raises:
        UserError: the source cannot be read, or the disk is full.
    """
    prefix = f"{identity[:16]}-{FORMAT}-{PART_ROWS}-"
    for part in folder.glob("*.parquet"):
        if not part.name.startswith(prefix):
            with disk_errors(part):
                part.unlink()
    rows: list[ScannedRow] = []
    known: dict[bytes, _Seen] = {}
    for start in range(0, len(source), PART_ROWS):
        part = folder / f"{prefix}{start // PART_ROWS:06d}.parquet"
        numbers = range(start, min(start + PART_ROWS, len(source)))
        done = _finished(part, numbers)
        if done:
            progress(len(done))
        else:
            for row in source.rows(numbers):
                done.append(_scan_row(row, known))
                progress(1)
            with atomic_path(part) as temporary:
                table = pa.Table.from_pylist([asdict(row) for row in done], _SCHEMA)
                pq.write_table(table, temporary, write_page_checksum=True)
        rows += done
    return rows


def _finished(part: Path, numbers: range) -> list[ScannedRow]:
    """The rows of a finished part; none where there is no such part or it is damaged."""
    try:
        with open_regular(part) as file:
            table = pq.read_table(file, schema=_SCHEMA, page_checksum_verification=True)
        rows = [_from_table(row) for row in table.to_pylist()]
    except (OSError, pa.ArrowException, ValueError, TypeError):
        return []
    return rows if [row.index for row in rows] == list(numbers) else []


def _from_table(row: dict[str, Any]) -> ScannedRow:
    found = dict(row)
    for half in ("chosen", "rejected"):
        found[f"{half}_size"] = tuple(row[f"{half}_size"])
        found[f"{half}_made"] = Made(*row[f"{half}_made"])
        found[f"{half}_colour"] = Colour(*row[f"{half}_colour"])
    return ScannedRow(**found)


def _clean(text: str) -> str:
    """Text that any file can hold: names of files need not be valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


class _Seen(NamedTuple):
    """Result of decoding an image. Exceptions are not kept: their traces would keep the image's bytes."""

    size: Size
    profile: Profile
    reason: str = ""
    detail: str = ""
    made: Made = Made()
    colour: Colour = Colour()


def _scan_row(row: PairRecord | SkippedRow, known: dict[bytes, _Seen]) -> ScannedRow:
    if isinstance(row, SkippedRow):
        return _skipped(row.index, row.name, "", row.reason, row.detail)
    found: dict[str, tuple[bytes, _Seen]] = {}
    names: list[str] = []
    for side, read in (("chosen", row.chosen), ("rejected", row.rejected)):
        if read is None:
            continue
        names.append(read.name)
        try:
            data = read()
        except MissingImageError as error:
            detail = f"{side}: {read.name}: {error}"
            return _skipped(row.index, row.name, row.prompt, error.reason, detail)
        key = content_hash(data)
        if key not in known:
            known[key] = _look(data)
        seen = known[key]
        if seen.reason:
            detail = f"{side}: {read.name}: {seen.detail}"
            return _skipped(row.index, row.name, row.prompt, seen.reason, detail)
        found[side] = key, seen
    absent = ABSENT, next(iter(found.values()))[1]._replace(profile="")
    (chosen, first), (rejected, second) = found.get("chosen", absent), found.get("rejected", absent)
    if chosen == rejected:
        detail = f"chosen and rejected are equal: {' and '.join(names)}"
        return _skipped(row.index, row.name, row.prompt, "identical images", detail)
    return ScannedRow(
        row.index,
        _clean(row.name),
        row.prompt,
        chosen,
        rejected,
        first.size,
        second.size,
        label=row.label,
        chosen_profile=first.profile,
        rejected_profile=second.profile,
        chosen_made=first.made,
        rejected_made=second.made,
        chosen_colour=first.colour,
        rejected_colour=second.colour,
    )


def _look(data: bytes) -> _Seen:
    try:
        image, profile = decode(data)
    except ImageProblemError as problem:
        return _Seen((0, 0), "", problem.reason, problem.detail)
    size = image.height, image.width
    return _Seen(size, profile, made=made_with(data), colour=_colour(image))


def _colour(image: Image.Image) -> Colour:
    """Mean brightness and saturation of a small copy."""
    small = image.reduce(max(1, min(image.size) // _COLOUR_SIDE)).convert("HSV")
    _, saturation, value = ImageStat.Stat(small).mean
    return Colour(value / 255, saturation / 255)


def _skipped(index: int, name: str, prompt: str, reason: str, detail: str) -> ScannedRow:
    return ScannedRow(index, _clean(name), prompt, b"", b"", (0, 0), (0, 0), reason, _clean(detail))
