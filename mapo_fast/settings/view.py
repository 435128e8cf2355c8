"""The settings as they run, each with where it comes from: `mapo-fast show` and a run's `settings.json`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from mapo_fast.settings.declare import Source
from mapo_fast.settings.page import written
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import flat

_LATER = "chosen when the run starts"


class Known(NamedTuple):
    """A setting of a run."""

    value: Any
    """Value in JSON's types; None also where the plan is not made yet."""
    source: Source


def known(config: Config, planned: Collection[str] = ()) -> dict[str, Known]:
    """`section.key` → value and source, section by section.

    A setting whose value stands for another one shows that one: the objective's default, a LoRA's `alpha`
    that is its rank, a reference that depends on what is trained.

    Args:
        planned: names of the settings that the memory plan chooses when the run starts.
    """
    values = flat(config) | _stands_for(config)
    sources: dict[str, Source] = {**config.sources, **dict.fromkeys(planned, "plan")}
    if config.train.epochs is not None:  # counted when the run starts
        sources["train.steps"], planned = "epochs", [*planned, "train.steps"]
    order = list(type(config).model_fields)
    return {
        name: Known(
            None if name in planned else to_jsonable_python(values[name]), sources.get(name, "default")
        )
        for name in sorted(values, key=lambda name: order.index(name.split(".")[0]))
    }


def _stands_for(config: Config) -> dict[str, Any]:
    objective, adapter = config.objective, config.adapter
    defaults = {name: objective.known.settings[name].default for name in objective.takes}
    found: dict[str, Any] = {
        f"objective.{name}": value for name, value in {**defaults, **objective.settings}.items()
    }
    if config.reference is not None:
        found["objective.reference"] = config.reference
    if adapter.alpha is None and adapter.kind == "lora":
        found["adapter.alpha"] = float(adapter.rank)
    return found


def as_json(settings: Mapping[str, Known]) -> dict[str, dict[str, Any]]:
    """One object: `section.key` → `{"value": …, "from": …}`."""
    return {name: {"value": value, "from": source} for name, (value, source) in settings.items()}


def as_text(settings: Mapping[str, Known]) -> Iterator[tuple[str, str]]:
    """Lines, with their style for a terminal: values that are not defaults stand out."""
    texts = {
        name: _LATER if source in ("plan", "epochs") and value is None else written(value)
        for name, (value, source) in settings.items()
    }
    keys = max(len(name.partition(".")[2]) for name in settings)
    values = min(_COLUMN, max(map(len, texts.values())))
    section = ""
    for name, (_, source) in settings.items():
        if not name.startswith(f"{section}."):
            yield from [("", "")] if section else []
            section = name.partition(".")[0]
            yield f"[{section}]", "bold"
        line = f"  {name.partition('.')[2]:<{keys}}  {texts[name]:<{values}}  {source}"
        yield line, "dim" if source == "default" else ""


_COLUMN = 40
"""Width in characters of the column of values; few paths and lists are longer."""
