"""The identity of a cache, and whether it is finished and whole: `settings.json` and `index.json`.

Neither torch nor numpy is imported: a cache can be looked at before there is time for either. Only a model's
identity (`cache_settings`) needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mapo_fast.models.sdxl import ENCODERS
from mapo_fast.settings.table import affecting
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import (
    JSON_BYTES,
    parse_json,
    read_bytes,
    read_json,
    sha256_file,
    unreadable,
    write_json,
)

if TYPE_CHECKING:
    from mapo_fast.models.pipeline import Pipeline
    from mapo_fast.settings.schema import DataConfig

FORMAT = 5
TAKEN_OVER = (2, 3, 4)
"""Formats with equal shards: `prepare` only writes the tables of such a cache again."""


def cache_settings(folder: Pipeline, data: DataConfig) -> dict[str, Any]:
    """Everything that decides a cache's contents for a source; `held_out` only changes the split."""
    from mapo_fast.models.identity import encoders_identity  # reads tokenizers, and needs torch

    return {
        "format": FORMAT,
        **encoders_identity(folder),
        "zeros_for_empty_prompt": folder.zeros_for_empty_prompt,
        **{row.key: getattr(data, row.key) for row in affecting("cache")},
    }


def difference(have: dict[str, Any], want: dict[str, Any]) -> str | None:
    """The first difference between two settings in words, or None."""
    younger = {row.key: row.default for row in affecting("cache")}  # settings may be younger than a cache
    have = younger | have
    have.pop("before", None)
    if have.get("format") != want["format"]:
        return f"has cache format {have.get('format')}, this version writes {want['format']}"
    for name in (row.key for row in affecting("cache")):
        if have.get(name) != want[name]:
            return f"was made for data.{name} = {have.get(name)}, the config says {want[name]}"
    zeros = [settings.get("zeros_for_empty_prompt") for settings in (have, want)]
    if zeros[0] != zeros[1]:
        return (
            f"was made for force_zeros_for_empty_prompt = {zeros[0]}, model_index.json in model.path says "
            f"{zeros[1]}"
        )
    if have != want:
        return "was made with another VAE, text encoder or tokenizer than the model has"
    return None


def only_text_differs(have: dict[str, Any], want: dict[str, Any]) -> bool:
    """Whether two settings differ in the text encoders or tokenizers alone: then the latents can stay."""
    return (
        "text" in have
        and have["text"] != want["text"]
        and not difference(have | {"text": want["text"]}, want)
    )


def translated(have: dict[str, Any], folder: Pipeline) -> dict[str, Any]:
    """The settings of a cache of an earlier format as they would be of this one.

    It may have been made before LoRAs were added to the text encoders: its latents can stay then.

    Before format 4 a model was known by its files, with their names and their configs' whole text; in
    format 4 by one digest for VAE and text. The old settings are kept too, because runs identify the cache by
    them.
    """
    if have.get("format") not in TAKEN_OVER:
        return have
    from mapo_fast.models.identity import encoders_identity, files_fingerprint, joint_identity
    from mapo_fast.models.merge import without_loras

    now = {"format": FORMAT, "before": have.get("before", have)}
    others = {name: value for name, value in have.items() if name != "model"}
    for model in (folder, without_loras(folder)):
        known = joint_identity(model) if have["format"] == 4 else files_fingerprint(model, ENCODERS)
        if known is not None and have.get("model") == known:
            return {**others, **now, **encoders_identity(model)}
    return {**have, **now}


class Claim(NamedTuple):
    """What to do with a cache folder."""

    settings: dict[str, Any]
    """Contents of its settings.json."""
    text_stays: bool = True
    """Whether its prompts stay; False if they are of other text encoders or tokenizers: latents stay then."""


def claim(cache: Path, settings: dict[str, Any], folder: Pipeline) -> Claim:
    """Check that the cache folder is empty, or made for these settings; nothing is written.

    A cache in which nothing has been encoded yet, as a rejected `prepare` leaves it, may become any other.

    Args:
        cache: the cache's folder, `data.cache`.
        settings: the settings to make it for.
        folder: the model, for caches of earlier formats.

    Raises:
        UserError: the folder's cache is for other settings, or the folder holds something else.
    """
    path = cache / "settings.json"
    index, shards = cache / "index.json", cache / "shards"
    if path.is_file() and (index.exists() or shards.is_dir()):  # a run's folder has a settings.json too
        if not index.exists() and not list(shards.glob("*.safetensors")):
            return Claim(settings)
        try:
            have = translated(read_json(path), folder)
        except UserError as error:
            raise UserError(f"{error}: choose another data.cache") from None
        if only_text_differs(have, settings):
            return Claim(settings, text_stays=False)
        if reason := difference(have, settings):
            raise UserError(f"data.cache {cache} {reason}: choose another data.cache (nothing was changed)")
        return Claim(have)
    # A kill during the first writes leaves the lock, the settings, their temporary file and nothing else.
    own = {cache / ".lock", path, *cache.glob(".settings.json.*.tmp")}
    if cache.exists() and (not cache.is_dir() or set(cache.iterdir()) - own):
        raise UserError(f"data.cache {cache} already holds something else: choose another data.cache")
    return Claim(settings)


def read_index(folder: Path) -> dict[str, Any] | None:
    """`index.json` of a finished cache; None if it is missing, or if its tables have to be made again.

    Raises:
        UserError: the index is damaged or edited, or of another version.
    """
    path = folder / "index.json"
    try:
        text = read_bytes(path, JSON_BYTES)
        index: dict[str, Any] = parse_json(text)
        written_by = index["settings"]["format"]
        if written_by == FORMAT and index["sha256"] != _digest(index):
            raise ValueError("its content is not what was written")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(f"data.cache {folder}", error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({reason}): delete it and run mapo-fast prepare again") from None
    if written_by in TAKEN_OVER:
        return None
    if written_by != FORMAT:
        raise UserError(
            f"data.cache {folder} has cache format {written_by}, this version reads {FORMAT}: prepare "
            "another data.cache"
        )
    return index


def write_index(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Write `index.json`, which finishes the cache; returns its contents."""
    index = {**index, "sha256": _digest(index)}
    write_json(folder / "index.json", index)
    return index


def _digest(index: dict[str, Any]) -> str:
    """SHA-256 of an index without its own `sha256`."""
    content = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_whole(folder: Path, index: dict[str, Any]) -> bool:
    """Whether every file is unchanged since it was written. If not, `prepare` makes it again or names it."""
    try:
        return all(
            (folder / name).stat().st_size == entry["bytes"] and sha256_file(folder / name) == entry["sha256"]
            for name, entry in index["files"].items()
        )
    except OSError:
        return False


class CacheIndex:
    """The index of a finished cache, and which of its files have been checked; see `CacheIndex.open`."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.content = folder, index
        self.settings: dict[str, Any] = index["settings"]
        self.pairs: int = index["pairs"]
        """Number of pairs, or of single images."""
        self.train: int = index["train"]
        """Number of pairs for training; the others are held out."""
        self.flips: bool = self.settings["flip"]
        """Whether the cache holds mirrored latents too."""
        self.labelled: bool = index.get("labelled", False)
        """Whether every pair has a soft label."""
        self.paired: bool = index.get("paired", True)
        """Whether the cache holds pairs; otherwise single images, each wanted or unwanted."""
        self._unverified = set(index["files"])

    @classmethod
    def open(cls, folder: Path) -> CacheIndex:
        """Read the index of a finished cache, and check that every file exists in its full size.

        Raises:
            UserError: missing, unfinished, cut short, or made by another version.
        """
        index = read_index(folder)
        if index is None:
            state = "is not a mapo_fast cache"
            if (folder / "settings.json").is_file():
                state = "is unfinished, or of an earlier version whose latents can be kept"
            raise UserError(f"data.cache {folder} {state}: run mapo-fast prepare")
        with reading(folder):
            for name, entry in index["files"].items():
                path = folder / name
                if not path.is_file():
                    raise missing(path)
                if path.stat().st_size != entry["bytes"]:
                    raise damaged(path)
        return cls(folder, index)

    @property
    def bytes(self) -> int:
        """Total bytes of all files."""
        return sum(entry["bytes"] for entry in self.content["files"].values())

    @property
    def fingerprint(self) -> str:
        """Identity of the cache's content: settings, pairs and split, shards.

        A cache that was taken over from an earlier format, with the same pairs and split, keeps its own.
        """
        settings = self.settings.get("before", self.settings)
        identity = {"settings": settings, "train": self.train, "files": self.content["files"]}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def check(self, settings: dict[str, Any], held_out: float) -> None:
        """Check that the cache was made for this model and these settings.

        Args:
            settings: what `cache_settings` gives for the config.
            held_out: the config's `data.held_out`.

        Raises:
            UserError: naming what differs.
        """
        if only_text_differs(self.settings, settings):
            raise UserError(
                f"data.cache {self.folder} was made with another text encoder or tokenizer than the model "
                "has: run mapo-fast prepare again (no image is encoded twice)"
            )
        if reason := difference(self.settings, settings):
            raise UserError(
                f"data.cache {self.folder} {reason}: run mapo-fast prepare again with another data.cache"
            )
        if self.content["held_out"] != held_out:
            raise UserError(
                f"data.cache {self.folder} was made for data.held_out = {self.content['held_out']}, the "
                f"config says {held_out}: run mapo-fast prepare again (nothing is encoded twice)"
            )

    def verify(self, name: str) -> None:
        """Check the SHA-256 of a file, if that has not been done.

        Raises:
            UserError: it is damaged, or cannot be read.
        """
        if name in self._unverified:
            with reading(self.folder):
                if sha256_file(self.folder / name) != self.content["files"][name]["sha256"]:
                    raise damaged(self.folder / name)
            self._unverified.discard(name)

    def verify_all(self) -> None:
        """`verify` every file."""
        for name in sorted(self._unverified):
            self.verify(name)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """One `UserError` for a file of the cache that cannot be read; it is not damaged."""
    try:
        yield
    except OSError as error:
        raise unreadable(f"data.cache {folder}", error) from error


def missing(path: Path) -> UserError:
    """Remedy for a missing file of the cache."""
    return UserError(f"{path} is missing from the cache: run mapo-fast prepare again")


def damaged(path: Path) -> UserError:
    """Remedy for a damaged file of the cache."""
    return UserError(
        f"{path} is damaged (its checksum is not the one it was written with): delete it and run "
        "mapo-fast prepare again, which makes only this file anew"
    )
