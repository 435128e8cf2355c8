"""A seal on what may be run again: a project from elsewhere must not bring commands.

The key is in the user's cache folder, readable by the user alone. Without it jobs are started anew.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from typing import Any

from mapo_fast.studio.index import cache_folder
from mapo_fast.util.files import atomic_path, disk_errors
from mapo_fast.util.records import plain


def seal(record: Mapping[str, Any]) -> str:
    """The seal of a record, by this user's key."""
    return hmac.new(_key(), plain(record).encode(), hashlib.sha256).hexdigest()


def is_sealed(record: Mapping[str, Any], given: object) -> bool:
    """Whether this user sealed the record."""
    return isinstance(given, str) and hmac.compare_digest(seal(record), given)


def _key() -> bytes:
    path = cache_folder() / "key"
    with disk_errors(path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_path(path) as temporary:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(secrets.token_bytes(32))
        return path.read_bytes()
