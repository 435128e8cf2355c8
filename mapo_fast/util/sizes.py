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
    """Bytes of a size such as "24GiB" or "11.5 GB"; GB is taken as GiB, which card makers mean.

    Raises:
        UserError: not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)\s*", text.lower())
    if match is None or float(match[1]) == 0:
        number = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*", text)
        example = f"{number[1]}GiB" if number and float(number[1]) else "24GiB"
        raise UserError(f'{name} = {text!r} is not a size; write it with its unit, "{example}"')
    return int(float(match[1]) * (GIB if match[2].startswith("g") else 2**20))
