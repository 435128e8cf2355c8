"""Entries of optimizers, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from mapo_fast.settings.optimizers import OPTIMIZERS, Optimizer, optimizer_names, register_optimizer
from mapo_kernels.objectives import resolve

GOOD: dict[str, Any] = {"build": "somewhere:build"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Mine", {}, "a name is lower-case letters"),
        ("adamw", {}, "registered already"),
        ("paged_adamw8bit", {}, "one that was removed"),
        ("mine", {"build": "no_colon"}, "build = 'no_colon' is not written as 'module:NAME'"),
        ("mine", {"smaller": "tiny"}, "smaller = 'tiny' is no registered optimizer"),
    ],
)
def test_an_entry_that_is_not_well_formed_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    before = dict(OPTIMIZERS)
    with patch.dict(OPTIMIZERS):
        with pytest.raises(ValueError, match=message):
            register_optimizer(name, Optimizer(**{**GOOD, **changes}))
        assert before == OPTIMIZERS
        register_optimizer("mine", Optimizer(**GOOD))
        assert optimizer_names()[-1] == "mine"
        with pytest.raises(TypeError, match="register an Optimizer, not dict"):
            register_optimizer("other", GOOD)  # type: ignore[arg-type]


def test_what_an_entry_names_is_there() -> None:
    for known in OPTIMIZERS.values():
        assert callable(resolve(known.build))
        assert known.smaller is None or known.smaller in OPTIMIZERS
