"""Every list of settings follows from how they are declared."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from mapo_fast.data.cache import cache_settings
from mapo_fast.data.index import difference
from mapo_fast.models.open import open_sdxl
from mapo_fast.run.precompute import depends_on
from mapo_fast.settings import page as page_module
from mapo_fast.settings.declare import Setting, rows, setting
from mapo_fast.settings.page import help_text, page
from mapo_fast.settings.rules import NAMES, completed
from mapo_fast.settings.schema import Section
from mapo_fast.settings.table import TABLE, affecting, kept_at_resume, on_cpu, paths, planned
from tests.training import make_config


class Oven(Section):
    """`[oven]`: how a cake is baked."""

    recipe: Path = setting(affects="inputs")
    """The recipe. It may move."""
    mould: Path | None = setting(None, affects="bookkeeping")
    """Where the cake goes."""
    heat: int = setting(180, affects=("arithmetic", "reference"), ge=50, lt=300)
    """Degrees. Celsius, not Fahrenheit."""
    fan: bool = setting(True, affects="execution", on_cpu=False)
    """Move the air."""
    rack: Literal["low", "middle", "high"] = setting("middle", affects="execution", planned="exact")
    """Where it stands."""
    flour: Literal["wheat", "rye"] = setting("wheat", affects="arithmetic", planned="last")
    """What it is made of."""


class Kitchen(Section):
    oven: Oven


KITCHEN = rows(Kitchen)


def names(table: list[Setting]) -> list[str]:
    return [row.name for row in table]


def test_lists_follow_the_declarations() -> None:
    assert names(affecting("arithmetic", KITCHEN)) == ["oven.heat", "oven.flour"]
    assert names(affecting("reference", KITCHEN)) == ["oven.heat"]
    assert planned("exact", KITCHEN) == {"oven.rack": ("middle", "low", "high")}
    assert planned("last", KITCHEN) == {"oven.flour": ("wheat", "rye")}
    assert kept_at_resume(KITCHEN) == ["oven.flour"]
    assert on_cpu(KITCHEN) == {"oven.fan": False}
    assert paths(KITCHEN) == ["oven.recipe", "oven.mould"]


def test_page_and_help_follow_the_declarations() -> None:
    text = page(Kitchen)
    assert "## [oven]\n\nHow a cake is baked.\n" in text
    assert "- **`oven.recipe`**: path; required. *inputs*<br>\n  The recipe. It may move.\n" in text
    assert "`oven.heat`**: integer at least 50 and below 300; default `180`. *arithmetic, reference*" in text
    assert "`oven.fan`**: true or false; default `true`, on the CPU `false`. *execution*" in text
    assert '`oven.rack`**: `"low"`, `"middle"` or `"high"`; default `"middle"`. *execution; planned*' in text
    assert "*arithmetic; planned where nothing else fits*" in text
    lines = help_text(KITCHEN).splitlines()
    assert "  oven.recipe  The recipe." in lines
    assert "  oven.mould = (unset)  Where the cake goes." in lines
    assert '  oven.rack = "middle"  Where it stands.' in lines


def test_a_setting_that_is_not_declared_whole_is_named() -> None:
    class Plain(Section):
        left: int = 3
        """What is left."""

    class Bare(Section):
        left: int = setting(3, affects="execution")

    class WithPlain(BaseModel):
        bare: Plain

    class WithBare(BaseModel):
        bare: Bare

    with pytest.raises(TypeError, match=r"bare\.left has to be declared by setting"):
        rows(WithPlain)
    [left] = rows(WithBare)
    with pytest.raises(TypeError, match=r"bare\.left has no docstring"):
        _ = left.text


def test_the_committed_page_is_current() -> None:
    """Write it anew by `python -m mapo_fast.settings.page`."""
    assert page_module.PAGE.read_text(encoding="utf-8") == page()


def test_help_has_every_setting() -> None:
    text = help_text()
    assert all(f"  {row.name} " in text for row in TABLE)


def test_a_cache_is_known_by_what_affects_it(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = open_sdxl(tiny_sdxl)
    data = make_config(tiny_sdxl, tmp_path, tmp_path).data
    want = cache_settings(folder, data)
    assert {row.name for row in affecting("cache")} == {
        f"data.{key}" for key in want.keys() & dict(data).keys()
    }
    for row in affecting("cache"):
        assert f"data.{row.key} = odd" in str(difference({**want, row.key: "odd"}, want))
        if want[row.key] == row.default:  # as if the setting were younger than the cache
            assert difference({name: value for name, value in want.items() if name != row.key}, want) is None


def test_what_the_reference_depends_on_has_names_of_its_own(tmp_path: Path) -> None:
    """Its identity names settings without their sections, next to the fingerprints of the run's inputs."""
    keys = [row.key for row in affecting("reference")]
    fingerprints = {"cache": "a", "start model": "b", "noise schedule": "c"}
    config = make_config(tmp_path, tmp_path, tmp_path, train={"seed": 5})
    found = depends_on(config, fingerprints)
    assert found == {**fingerprints, "seed": 5, "pairs_per_batch": 2, "precision": "fp32",
                     "caption_dropout": 0.2, "base": "dense"}  # fmt: skip
    assert len(found) == len(keys) + len(fingerprints)


def test_rules_speak_of_settings_that_exist_and_can_be_resolved() -> None:
    table = {row.name: row for row in TABLE}
    assert {*NAMES} <= table.keys()
    assert {*planned("exact")} <= {*NAMES}
    defaults = {name: table[name].default for name in NAMES}
    assert completed(defaults, set(), TABLE) == {name: values[0] for name, values in planned("exact").items()}
