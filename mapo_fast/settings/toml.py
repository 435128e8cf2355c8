"""Parse TOML with one kind of exception."""

from __future__ import annotations

import re
import tomllib
from typing import Any


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads` that raises only `ValueError`, also for tables that are nested too deeply."""
    try:
        if _DEEP_KEY.search(text):  # tomllib takes minutes for keys of tens of thousands of parts
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_DEEP_KEY = re.compile(r"""(?:["'\w-]{1,64}\s?\.\s?){64}""")
