"""JSON files that are checked as they are read: against damage and mix-ups, not attackers.

Each file is an object; its entry `sha256` is over all other entries (written without spaces, keys sorted).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapo_fast.util.files import write_json


class WrongFileError(ValueError):
    """A file is damaged or of another run. The text says why, and follows the file's name in a message."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, atomically.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    write_json(path, {**record, "sha256": _checksum(record)})


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The object that was given to `write_record`, from the file's contents.

    Raises:
        WrongFileError: the contents do not match their checksum.
    """
    given = {name: value for name, value in record.items() if name != "sha256"}
    try:
        whole = record.get("sha256") == _checksum(given)
    except RecursionError:
        whole = False
    if not whole:
        raise WrongFileError("does not match its checksum")
    return given


def plain(value: Mapping[str, Any]) -> str:
    """JSON text that checksums are computed over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of the record in the form it has after writing and reading."""
    return hashlib.sha256(plain(json.loads(json.dumps(record))).encode()).hexdigest()
