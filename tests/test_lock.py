"""`constraints.txt` says what `uv.lock` says, and both know all that `pyproject.toml` asks for."""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK: dict[str, Any] = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
CONSTRAINTS = [Requirement(line) for line in LINES if line.strip() and not line.startswith("#")]
PINNED = [one for one in CONSTRAINTS if one.name != "triton"]


def asked(*extras: str) -> set[str]:
    """Names that the base, these extras and all groups ask for."""
    project = PROJECT["project"]
    texts = [*project["dependencies"], *(t for e in extras for t in project["optional-dependencies"][e])]
    texts += [text for group in PROJECT["dependency-groups"].values() for text in group]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_constraints_are_the_locks_versions() -> None:
    locked = {(package["name"], package.get("version")) for package in LOCK["package"]}
    assert PINNED
    for one in PINNED:
        [version] = [each.version for each in one.specifier if each.operator == "=="]
        assert (canonicalize_name(one.name), version) in locked, one


def test_constraints_pin_all_that_an_environment_of_the_makefile_asks_for() -> None:
    assert asked("train", "examples", "score") <= {canonicalize_name(one.name) for one in CONSTRAINTS}


def test_the_lock_is_of_this_pyproject() -> None:
    [mine] = [package for package in LOCK["package"] if package["name"] == "mapo-fast"]
    assert mine["version"] == PROJECT["project"]["version"]
    locked = {(one["name"], one.get("specifier", "")) for one in mine["metadata"]["requires-dist"]}
    locked |= {(r["name"], r["specifier"]) for g in mine["metadata"]["requires-dev"].values() for r in g}
    project = PROJECT["project"]
    lists = (*project["optional-dependencies"].values(), *PROJECT["dependency-groups"].values())
    stated = [Requirement(text) for text in (*project["dependencies"], *chain(*lists))]
    assert {name for name, _ in locked} == {canonicalize_name(one.name) for one in stated}
    for one in stated:
        assert any(name == canonicalize_name(one.name) and _same(text, one) for name, text in locked), one


def _same(text: str, stated: Requirement) -> bool:
    return Requirement(f"x{text}").specifier == stated.specifier
