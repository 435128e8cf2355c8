"""JSON files that are checked as they are read: against damage and mix-ups, not attackers.

An object; its entry `sha256` is that of all other entries (written without spaces, keys sorted).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapo_fast.util.files import write_json


class WrongFileError(ValueError):
    """A file that is not what it should be. The text says why and follows the file's name."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, atomically.

    Raises:
        UserError: as `files.disk_errors`.
    """
    write_json(path, {**record, "sha256": _checksum(record)})


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The object that was given to `write_record`, from what stands in the file.

    Raises:
        WrongFileError: it is another one.
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
    """JSON as checksums take it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of what the record is after it was written and read."""
    return hashlib.sha256(plain(json.loads(json.dumps(record))).encode()).hexdigest()
