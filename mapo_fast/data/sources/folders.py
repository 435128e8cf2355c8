"""Preference pairs from two folders, `chosen/` + `rejected/` or `w/` + `l/`.

File names are equal up to the suffix, subfolders included, and a caption `<name>.txt` or `<name>.caption` is
next to the chosen or the rejected image. Of one name's two captions the `.txt` is read.

A file is an image by its suffix (`IMAGE_SUFFIXES`; whether it can be decoded is found when it is read), or by
what goes with it: a file with another suffix, or none, that has a caption or a twin in the other folder. What
tools put next to images (`_COMPANIONS`) is none, nor is a file with an unknown suffix that shares its name
with an image.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mapo_fast.data.sources.base import PairRecord, PreferencePairs, SkippedRow
from mapo_fast.data.sources.cells import clean_prompt
from mapo_fast.data.sources.listing import Entry, ImageFile, form, list_files, problems
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.files import os_error, read_bytes

_IMAGES = """
apng avif avifs bmp dib gif heic heics heif heifs hif ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx jxl jxr
mpo pbm pcx pgm png pnm ppm psd qoi sgi svg tga tif tiff webp
arw cr2 cr3 dng nef orf raf rw2 emf eps exr hdr wmf
"""
_TOOLS = """
bak csv db ini json jsonl lock log md npy npz parquet pt safetensors sha256 tmp toml tsv txt xml xmp
yaml yml
"""
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
_COMPANIONS = frozenset(_TOOLS.split())
_CAPTIONS = ("txt", "caption")
CAPTION_BYTES = 1 << 20


def twin_folders(folder: Path) -> tuple[str, str] | None:
    """The names of the two twin folders in `folder`, or None where there are none."""
    for names in (("chosen", "rejected"), ("w", "l")):
        if all((folder / name).is_dir() for name in names):
            return names
    return None


class _Side(NamedTuple):
    """One folder's files by their names without the suffix."""

    images: dict[str, list[Entry]]
    captions: dict[str, list[Entry]]
    others: dict[str, list[Entry]]

    def files(self, stem: str) -> list[Entry]:
        return self.images.get(stem) or self.others.get(stem, [])


class TwinFolderPairs(PreferencePairs):
    """`chosen/` and `rejected/` (or `w/` and `l/`) with equal names, and captions in either."""

    looked_for = "chosen/ + rejected/ folders, w/ + l/ folders"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder with two such folders in it."""
        return twin_folders(path) is not None

    @classmethod
    def open(cls, path: Path) -> TwinFolderPairs:
        """See `PreferencePairs.open`."""
        names = twin_folders(path)
        assert names is not None
        pairs = cls(path, *names)
        if names == ("w", "l"):
            kohya = "w/ and l/ as kohya's DPO data have them: w/ is chosen, l/ is rejected"
            pairs.note = "; ".join(filter(None, [kohya, pairs.note]))
        return pairs

    def __init__(self, folder: Path, chosen: str, rejected: str) -> None:
        self.folder, self.names = folder, (chosen, rejected)
        self._sides = [_side(folder / name) for name in self.names]
        self._pairs = self._matched()
        if not len(self):
            raise UserError(f"data.source {folder}: {chosen}/ and {rejected}/ hold no images")
        self.note = problems(
            [
                Entry(f"{name}/{entry.name}", entry.path, entry.problem)
                for number, (name, side) in enumerate(zip(self.names, self._sides, strict=True))
                for stem, entries in side.others.items()
                for entry in entries
                if stem in side.images or stem not in {pair[number] for pair in self._pairs}
            ]
        )

    def _matched(self) -> list[tuple[str, str]]:
        """Which names make a row: here equal ones, also where one folder alone has it."""
        first, second = self._sides
        stems = first.images.keys() | second.images.keys() | (first.others.keys() & second.others.keys())
        for side in self._sides:
            stems |= side.others.keys() & (first.captions.keys() | second.captions.keys())
        if first.images and second.images and not any(first.files(s) and second.files(s) for s in stems):
            one, other = (
                f"{name}/{next(iter(side.images.values()))[0].name}"
                for name, side in zip(self.names, self._sides, strict=True)
            )
            raise UserError(
                f"data.source {self.folder}: {self.names[0]}/ and {self.names[1]}/ have no file name in "
                f"common ({one}, {other}), and the two images of a pair have equal names: rename them, or "
                'set data.pair_by to "order" (numbered files, the first with the first) or "prompt" (by the '
                "prompts that A1111 and ComfyUI write into images)"
            )
        return [(stem, stem) for stem in sorted(stems)]

    def __len__(self) -> int:
        """Distinct file names, suffixes aside."""
        return len(self._pairs)

    def read(self, rows: Sequence[int]) -> Iterator[PairRecord | SkippedRow]:
        """See `PreferencePairs.read`."""
        for index in rows:
            yield self._row(index)

    def files(self) -> Iterable[Path]:
        """Images and captions."""
        for pair in self._pairs:
            for side, stem in zip(self._sides, pair, strict=True):
                yield from (entry.path for entry in side.files(stem))
                yield from (entry.path for entry in side.captions.get(stem, ()))

    def _row(self, index: int) -> PairRecord | SkippedRow:
        return self._made(index, self._pairs[index])

    def _made(self, index: int, stems: tuple[str, str], own: str = "") -> PairRecord | SkippedRow:
        """The row of two names; its prompt is `own` where there is no caption."""
        name = f"{self.names[0]}/{stems[0]}"
        found = [side.files(stem) for side, stem in zip(self._sides, stems, strict=True)]
        captions = [side.captions.get(stem, []) for side, stem in zip(self._sides, stems, strict=True)]
        for side, stem, images, texts in zip(self.names, stems, found, captions, strict=True):
            if not images:
                return SkippedRow(index, name, "missing counterpart", f"no image {stem}.* in {side}/")
            for files in (images, texts):
                if len(files) > 1:
                    # ascii: the names may look equal
                    detail = f"{side}/ has " + ", ".join(
                        entry.name if entry.name.isascii() else ascii(entry.name) for entry in files
                    )
                    return SkippedRow(index, name, "ambiguous name", detail)
        own = own or self.default_caption
        for side, texts in zip(self.names, captions, strict=True):
            if texts:
                where = f"{side}/{texts[0].name}"
                try:
                    text = _caption(texts[0].path)
                except (OSError, ValueError) as error:
                    detail = f"{where}: {getattr(error, 'strerror', None) or error}"
                    return SkippedRow(index, name, "unreadable caption", detail)
                prompt = clean_prompt(index, name, text, where, default=own)
                break
        else:
            if not own:
                beside = [f"{side}/{files[0].name}" for side, files in zip(self.names, found, strict=True)]
                names = " or ".join(
                    f"{stem}.{suffix}" for stem in dict.fromkeys(stems) for suffix in _CAPTIONS
                )
                detail = f"no {names} next to {' or '.join(beside)}"
                return SkippedRow(index, name, "missing caption", detail)
            prompt = own
        if isinstance(prompt, SkippedRow):
            return prompt
        chosen, rejected = (
            ImageFile(f"{side}/{files[0].name}", files[0].path)
            for side, files in zip(self.names, found, strict=True)
        )
        return PairRecord(index, name, prompt, chosen, rejected)


def _caption(path: Path) -> str:
    try:
        data = read_bytes(path, CAPTION_BYTES)
    except OSError as error:
        if isinstance(stopped := os_error(error, f"read {path}"), MachineError):
            raise stopped from None
        raise
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def _side(folder: Path) -> _Side:
    side, second = _Side({}, {}, {}), dict[str, list[Entry]]()
    for entry in list_files(folder):
        directory, slash, name = entry.name.rpartition("/")
        if name.startswith("."):
            continue
        base, _, suffix = name.rpartition(".")
        stem, suffix = form(f"{directory}{slash}{base or name}"), suffix.lower() if base else ""
        if suffix == "txt":
            kind = side.captions
        elif suffix == "caption":
            kind = second
        elif suffix in IMAGE_SUFFIXES:
            kind = side.images
        elif suffix in _COMPANIONS:
            continue
        else:
            kind = side.others
        kind.setdefault(stem, []).append(entry)
    for stem, entries in second.items():
        side.captions.setdefault(stem, entries)
    return side
