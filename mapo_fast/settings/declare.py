"""How a setting is declared, and the table that is read off the declarations.

A field of a `Section` is declared once, by `setting`: type, default and limits as pydantic has them, its
docstring, and the facts that the rest of the program needs. `rows` collects these. Code that needs a list of
settings takes it from there (`table.py`) and keeps none of its own.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field
from pydantic.fields import FieldInfo

from mapo_fast.util.extensions import load_installed

Affects = Literal["inputs", "cache", "arithmetic", "reference", "execution", "bookkeeping"]
"""What changes with the value of a setting:

inputs       the data and the models that a run starts from: identified by content, so folders may move
cache        what `prepare` encodes: another value needs another cache
arithmetic   the updates and the figures of a run: fixed for all of a run
reference    the reference's errors that are computed before the first step, and kept
execution    how a run is computed, with the same result up to rounding: free at a resume
bookkeeping  what is written, kept and shown, and where: free at a resume
"""
Planned = Literal["no", "exact", "last"]
"""Whether the planner may choose an unset setting: no; yes, because the gradients are the same under all its
values; or only where nothing else fits, because it changes what is computed."""

Source = Literal[
    "preset",
    "file",
    "command line",
    "stated",
    "device",
    "start LoRA",
    "resumed run",
    "plan",
    "model",
    "epochs",
    "default",
]
"""Where a value comes from:

preset        `--preset`
file          the config file
command line  `--set`
stated        a program that made the config in Python
device        the CPU has another default, or several processes allow one value only
start LoRA    the LoRA in `adapter.start` has it
resumed run   the run that is continued had it, and the config leaves it to the memory plan
plan          the memory plan chose it
model         the model says so, where the setting is `auto`: for `mapo-fast show` and a run's `settings.json`
epochs        `train.epochs` and the number of training pairs give it
default       none of these; completed where the default does not work with the set values (`rules.py`)
"""

_REQUIRED: Any = ...
_AS_ANYWHERE: Any = object()


def setting(
    default: Any = _REQUIRED,
    *,
    affects: Affects | tuple[Affects, ...],
    planned: Planned = "no",
    on_cpu: Any = _AS_ANYWHERE,
    **constraints: Any,
) -> Any:
    """Declare a field of a `Section`.

    Args:
        default: value of the setting where a config leaves it out; without one the setting is required.
        affects: see `Affects`.
        planned: see `Planned`.
        on_cpu: default in a run on the CPU, where that differs.
        constraints: pydantic's `ge`, `lt`, `pattern`, ….
    """
    extra = {
        "affects": (affects,) if isinstance(affects, str) else affects,
        "planned": planned,
        "on_cpu": default if on_cpu is _AS_ANYWHERE else on_cpu,
    }
    return Field(default, json_schema_extra={"setting": extra}, **constraints)


@dataclass(frozen=True)
class OneOf:
    """Check that a registry has a name, for an `AfterValidator`.

    For an unknown name, installed packages are asked first (`util.extensions`).
    """

    names: Callable[[], Sequence[str]]
    """Returns the names that are registered now."""

    def __call__(self, name: str) -> str:
        """Return the name."""
        if name in self.names():
            return name
        problems = load_installed()
        if name in (names := self.names()):
            return name
        *first, last = map(repr, names)
        known = f"Input should be {', '.join(first)} or {last}, or one that --allow-code adds"
        raise ValueError("; ".join([known, *problems]))


class Setting(NamedTuple):
    """A row of the table."""

    section: str
    key: str
    type: Any
    """The field's type annotation."""
    default: Any
    """Default value; None also for a required setting."""
    required: bool
    on_cpu: Any
    """The default on the CPU."""
    affects: tuple[Affects, ...]
    planned: Planned
    limits: tuple[Any, ...]
    """Limits in `annotated_types`' and pydantic's form, such as `Ge(0)`."""
    declared_in: type[BaseModel]

    @property
    def name(self) -> str:
        """The setting's name in configs and messages: `section.key`."""
        return f"{self.section}.{self.key}"

    @property
    def text(self) -> str:
        """The setting's documentation.

        Raises:
            TypeError: the field has no docstring.
        """
        try:
            return _docstrings(self.declared_in)[self.key]
        except KeyError:
            raise TypeError(f"{self.name} has no docstring below its declaration") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a registry now has for the setting; empty for a setting without a registry."""
        checks = (limit.func for limit in self.limits if isinstance(limit, AfterValidator))
        return next((tuple(check.names()) for check in checks if isinstance(check, OneOf)), ())

    @property
    def is_path(self) -> bool:
        """Whether its value names a file or folder."""
        return Path in _members(self.type)

    @property
    def choices(self) -> tuple[Any, ...]:
        """All values of a setting of names or truth values, the default first; else the default alone."""
        found = [self.default, *(name for name in self.names if name != self.default)]
        for member in _members(self.type):
            values = (True, False) if member is bool else get_args(member) if _is_literal(member) else ()
            found += [value for value in values if value != self.default]
        return tuple(found)


@functools.cache
def rows(config: type[BaseModel]) -> tuple[Setting, ...]:
    """The table of a config's settings, in the order of their declaration.

    Raises:
        TypeError: a field is declared without `setting`.
    """
    return tuple(
        _row(section, key, field, part.annotation)  # type: ignore[arg-type]
        for section, part in config.model_fields.items()
        for key, field in part.annotation.model_fields.items()  # type: ignore[union-attr]
    )


def _row(section: str, key: str, field: FieldInfo, part: type[BaseModel]) -> Setting:
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or "setting" not in extra:
        raise TypeError(f"{section}.{key} has to be declared by setting(…)")
    required = field.is_required()
    said: Any = extra["setting"]
    return Setting(
        section,
        key,
        field.annotation,
        None if required else field.default,
        required,
        None if required else said["on_cpu"],
        said["affects"],
        said["planned"],
        tuple(field.metadata),
        part,
    )


@functools.cache
def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The docstrings below a section's fields, by field.

    They are read from the source when somebody asks: that costs a quarter of what a mistyped command costs.
    """
    [declaration] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(declaration, ast.ClassDef)
    found = {}
    for field, below in pairwise(declaration.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    found[field.target.id] = " ".join(text.split())
    return found


def _members(type_: Any) -> tuple[Any, ...]:
    """The members of a union type; any other type by itself."""
    return get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)


def _is_literal(type_: Any) -> bool:
    return get_origin(type_) is Literal
