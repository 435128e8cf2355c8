"""The table of settings as text: `docs/settings.md` and what `--help` prints.

python -m mapo_fast.settings.page          # write docs/settings.md again
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from mapo_fast.settings.declare import Setting, rows
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

_INTRODUCTION = """\
# Settings

One TOML file serves `mapo-fast prepare`, `train`, `plan` and `show`; `--set section.key=value` replaces one
setting.

`mapo-fast show CONFIG` prints the settings as a new run on this machine has them, each with where it comes
from: `preset`, `file`, `command line`, `plan` (the memory plan), `device` (the CPU has some defaults of its
own), `start LoRA` (`adapter.start` has it), `model` (where a setting is `auto`) or `default`. Where the model
or the GPU is not on this machine, the plan's settings are "chosen when the run starts". `--json` prints one
object, `"section.key": {"value": …, "from": …}`, where these are null.

A run keeps this list in `settings.json` of its folder, once for each start with other settings. There a value
may also come from the `resumed run`, from a Python program (`stated`), or be the only one that several
processes allow (`device`).

What a setting affects says when it may change:

- **inputs**: the data and the models that a run starts from. They are identified by content, so folders may
  move.
- **cache**: what `prepare` encodes. Another value needs another `data.cache`.
- **arithmetic**: the updates and the figures of a run. `train --resume` rejects another value.
- **reference**: the reference's errors that are computed before the first step and kept in the run's folder.
- **execution**: how a run is computed, with the same result up to rounding. A resume may change it.
- **bookkeeping**: what is written, kept and shown, and where. A resume may change it.

The memory plan (`train.vram`) chooses "planned" settings that are unset. It changes those "planned where
nothing else fits" last, because they change what is computed.

<!-- Generated from mapo_fast/settings/schema.py by `python -m mapo_fast.settings.page`. -->
"""


def page(config: type[BaseModel] = Config) -> str:
    """The page of all settings, in Markdown."""
    table, lines = rows(config), [_INTRODUCTION]
    for section, field in config.model_fields.items():
        about = " ".join((getattr(field.annotation, "__doc__", "") or "").partition(":")[2].split())
        lines.append(f"## [{section}]\n\n{about[:1].upper()}{about[1:]}\n")
        lines += [_entry(row) for row in table if row.section == section]
    return "\n".join(lines)


def help_text(table: Sequence[Setting] = TABLE) -> str:
    """Every setting on one line: name, default, the first sentence of its documentation."""
    lines = ["Settings (docs/settings.md has all of each):", ""]
    for row in table:
        default = "" if row.required else f" = {written(row.default)}"
        lines.append(f"  {row.name}{default}  {row.text.partition('. ')[0].rstrip('.')}.")
    return "\n".join(lines)


def written(value: Any) -> str:
    """A value in TOML; `(unset)` for None, which TOML does not have."""
    return "(unset)" if value is None else json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _entry(row: Setting) -> str:
    notes = [", ".join(row.affects)]
    if row.planned != "no":
        notes.append("planned" if row.planned == "exact" else "planned where nothing else fits")
    default = "required" if row.required else f"default {_code(row.default)}"
    if row.on_cpu != row.default:
        default += f", on the CPU {_code(row.on_cpu)}"
    return f"- **`{row.name}`**: {_kind(row)}; {default}. *{'; '.join(notes)}*<br>\n  {row.text}\n"


def _code(value: Any) -> str:
    return "none" if value is None else f"`{written(value)}`"


_WORDS = {bool: "true or false", int: "integer", float: "number", str: "string", Path: "path"}


def _kind(row: Setting) -> str:
    if row.names:
        return _either(f"`{written(name)}`" for name in row.names)
    limits = " and ".join(filter(None, map(_limit, row.limits)))
    return " ".join(filter(None, [_type(row.type), limits]))


def _type(type_: Any) -> str:
    """The type of a setting, in words."""
    origin, members = get_origin(type_), get_args(type_)
    if origin in (Union, types.UnionType):
        return _either(_type(member) for member in members if member is not type(None))
    if origin is Literal:
        return _either(f"`{written(value)}`" for value in members)
    if origin is tuple:
        return f"list of {_WORDS[members[0]]}s" if members[-1] is ... else f"list of {len(members)} numbers"
    return _WORDS[type_]


def _either(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _limit(limit: Any) -> str:
    for kind, key, words in (
        (Ge, "ge", "at least"),
        (Gt, "gt", "above"),
        (Le, "le", "at most"),
        (Lt, "lt", "below"),
        (MultipleOf, "multiple_of", "a multiple of"),
    ):
        if isinstance(limit, kind):
            value = getattr(limit, key)
            return f"{words} {value:,}" if isinstance(value, int) else f"{words} {value:g}"
    return ""


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
