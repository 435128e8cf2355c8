"""Read cells of tables and fields of lines, in whatever type people store them.

Each function gives the value that a person means, or a `SkippedRow` that shows what was found. None raises.
"""

from __future__ import annotations

import math
import sys
from decimal import Decimal
from numbers import Real
from typing import Any

from mapo_fast.data.sources.base import SkippedRow
from mapo_fast.util.errors import shown

_WORDS = {"true": 1.0, "false": 0.0}


def clean_prompt(
    index: int, name: str, prompt: object, key: str = "prompt", *, default: str = ""
) -> str | SkippedRow:
    """The prompt without surrounding white space, or why the row cannot be used. Bytes are read as UTF-8.

    A prompt that is missing or blank is the `default` where there is one.
    """
    if default and is_missing(prompt):
        return default
    if prompt is None:
        return SkippedRow(index, name, "missing caption", f"{key} is missing or null")
    text = _plain(prompt)
    if not isinstance(text, str):
        return SkippedRow(index, name, "bad caption", f"{key} = {shown(text)} is no text")
    stripped = text.strip()
    try:
        stripped.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        detail = f"{key} is not valid Unicode: {error.reason} in {shown(stripped)}"
        return SkippedRow(index, name, "bad caption", detail)
    return stripped or SkippedRow(index, name, "empty caption", f"{key} = {shown(text)}")


def soft_label(index: int, name: str, label: object) -> float | SkippedRow:
    """A label in [0, 1], or why the row cannot be used."""
    value = number(label)
    if value is not None and 0 <= value <= 1:
        return value
    return SkippedRow(index, name, "bad label", f"label = {shown(label)} is no number from 0 to 1")


def wanted(index: int, name: str, label: object) -> bool | SkippedRow:
    """Whether a single image is wanted, or why the row cannot be used."""
    if is_missing(label):
        return SkippedRow(index, name, "no label", "label is missing, null or blank")
    value = number(label)
    if value in (0, 1):
        return bool(value)
    detail = f"label = {shown(label)} is neither true or 1 nor false or 0"
    return SkippedRow(index, name, "bad label", detail)


def number(value: object) -> float | None:
    """The finite number that a value is or spells (true is 1, false is 0); None where it is none."""
    value = _plain(value)
    if isinstance(value, str):
        value = value.strip().lower()
        if value in _WORDS:
            return _WORDS[value]
        if len(value) > 40 or "_" in value:  # Python's own 1_0
            return None
    elif _is_time(value) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, or blank text."""
    value = _plain(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _plain(value: Any) -> Any:
    """Python's own value of a numpy scalar; text of bytes that hold UTF-8."""
    np = _numpy()
    if _is_time(value):
        return value
    if np and (isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)):
        value = value.item()
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError:
            return bytes(value)
    return value


def _is_time(value: Any) -> bool:
    """Whether a value is one of numpy's times, which would look like a label."""
    np = _numpy()
    return bool(np) and isinstance(value, (np.datetime64, np.timedelta64))


def _numpy() -> Any:
    """numpy if it has been imported; otherwise no value can be numpy's."""
    return sys.modules.get("numpy")
