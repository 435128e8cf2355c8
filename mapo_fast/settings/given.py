"""Settings from a file or a program, converted to the form in which they are validated: JSON.

So the same values are accepted from both: paths are strings and tuples are lists, but true is not 1 and "2"
is not 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

from mapo_fast.util.errors import UserError, shown


def as_json(table: Mapping[str, Any]) -> str:
    """The text of a nested dict of settings.

    Raises:
        ValueError: no setting can have the value.
    """
    text = json.dumps(table, default=_plain, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 30) : error.end + 30]
        raise ValueError(f"the text at {shown(near)} is not valid UTF-8: write it anew") from None
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):  # numpy's numbers
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, date | time):
        raise ValueError(f"{value} is a date or a time here: put it in quotes where it is meant as text")
    raise ValueError(
        f"{shown(value)} is no value of a setting: give text, a path, a number, true or false, or a list"
    )


def user_path(name: str, text: str, base: Path | None = None) -> Path:
    """A path as a person writes it, `~` included, from `base` or the working folder.

    Raises:
        UserError: no file can have this path; the message has `name`.
    """
    if not text:
        raise UserError(f"{name} is empty: name a file or folder")
    if "\0" in text:
        raise UserError(f"{name} = {shown(text)} has a NUL character in it, which no path can have")
    try:
        path = (base or Path()) / Path(text).expanduser()
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} = {str(path)!r} is not valid UTF-8: rename the file or folder") from None
    except RuntimeError:
        raise UserError(f"{name} = {shown(text)}: no home folder is known for this '~'") from None
    return path
