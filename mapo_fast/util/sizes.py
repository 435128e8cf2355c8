"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

from mapo_fast.util.errors import UserError

GIB = 2**30


def size_text(nbytes: int) -> str:
    """A size that `parse_size` reads as at least this many bytes."""
    return f"{math.ceil(100 * nbytes / GIB) / 100:.2f}GiB"


def parse_size(text: str, name: str) -> int:
    """Bytes of a size such as "24GiB", "11.5 GB" or "24"; GB and a bare number mean GiB, as card makers do.

    Raises:
        UserError: not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib|)\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise UserError(f'{name} = {text!r} is not a size: write it as "24GiB"')
    return int(float(match[1]) * (2**20 if match[2].startswith("m") else GIB))
