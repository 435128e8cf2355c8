"""Stated settings are judged together, and open ones take what works with them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from mapo_fast.settings.load import parse_config, with_settings
from mapo_fast.settings.rules import NAMES, work
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import planned
from mapo_fast.util.errors import UserError

OPEN = planned("exact")
VALUES = {**OPEN, "train.gradient_checkpointing": (True, False, ["mid_block"])}


def table_of(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {
        "model": {"path": "m"},
        "data": {"cache": "c"},
        "train": {"output": "o"},
    }
    for name, said in settings.items():
        section, key = name.split(".")
        table.setdefault(section, {})[key] = said
    return table


def config_of(settings: dict[str, Any]) -> Config:
    return parse_config(table_of(settings))


def value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def stated_together(count: int) -> list[dict[str, Any]]:
    """Every choice of values for every `count` settings of a plan."""
    return [
        dict(zip(names, picks, strict=True))
        for names in itertools.combinations(VALUES, count)
        for picks in itertools.product(*(VALUES[name] for name in names))
    ]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("settings", stated_together(1), ids=str)
def test_a_setting_alone_is_completed(settings: dict[str, Any], kind: str) -> None:
    config = config_of({**settings, "adapter.kind": kind})
    assert work({name: value(config, name) for name in NAMES})
    assert json.loads(config.model_dump_json(exclude_unset=True)) == table_of(
        {**settings, "adapter.kind": kind}
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"train.accumulation": 4}, {"train.precision": "fp16"}], ids=str)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("count", [2, 3])
def test_settings_together_are_completed_or_refused_by_name(
    count: int, kind: str, more: dict[str, Any]
) -> None:
    """Refused only where no values of the others would do, and then with a way out."""
    defaults = {name: value(config_of({}), name) for name in NAMES}
    for some in stated_together(count):
        settings = {"adapter.kind": kind, **more, **some}
        try:
            config = config_of(settings)
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert not any(
                work({**defaults, **dict(zip(OPEN, rest, strict=True)), **settings})
                for rest in itertools.product(*OPEN.values())
            )
            assert sum(f"{name} = {json.dumps(said)}" in message for name, said in settings.items()) >= 2
            assert "use " in message
            continue
        assert work({name: value(config, name) for name in NAMES})
        for name, said in some.items():
            assert value(config, name) == (tuple(said) if isinstance(said, list) else said)


@pytest.mark.parametrize(
    ("settings", "completed"),
    [
        ({"train.gradient_checkpointing": False}, {"train.layout": "joint"}),
        ({"offload.optimizer": "cpu"}, {"train.fused_step": True, "train.layout": "split"}),
        ({"offload.weights": "cpu"}, {"train.fused_step": False, "offload.optimizer": "gpu"}),
        (
            {"offload.weights": "cpu", "adapter.kind": "full"},
            {"train.fused_step": True, "offload.optimizer": "cpu"},
        ),
        (
            {"offload.optimizer": "cpu", "train.gradient_checkpointing": False},
            {"train.fused_step": True, "train.layout": "joint"},
        ),
    ],
    ids=str,
)
def test_what_completes_is_the_nearest_that_works(
    settings: dict[str, Any], completed: dict[str, Any]
) -> None:
    config = config_of(settings)
    for name in OPEN:
        expected = settings.get(name, completed.get(name, OPEN[name][0]))
        assert value(config, name) == expected, name
    section, key = next(iter(completed)).split(".")
    assert key not in getattr(config, section).model_fields_set


def test_completed_settings_give_way_to_stated_ones() -> None:
    """A plan, or a resumed run, states what was completed before."""
    alone = config_of({"train.gradient_checkpointing": False})
    assert with_settings(alone, {"train.gradient_checkpointing": True}).train.layout == "split"
    assert with_settings(alone, {"train.layout": "sequential"}).train.layout == "sequential"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"offload.optimizer": "cpu", "train.accumulation": 4},
            r'train\.accumulation = 4 and offload\.optimizer = "cpu" cannot be combined \(.*\): '
            r'use train\.accumulation = 1, or use offload\.optimizer = "gpu"$',
        ),
        (
            {"train.layout": "split", "train.gradient_checkpointing": False},
            r'use train\.layout = "joint", or use train\.gradient_checkpointing = true$',
        ),
        (
            {"train.layout": "sequential", "train.fused_step": True},
            r'use train\.fused_step = false, or use train\.layout = "split"$',
        ),
        ({"adapter.kind": "full", "adapter.base": "nf4"}, 'use adapter.base = "dense", or use adapter.kind'),
        ({"adapter.kind": "lora", "speed.fp8": True}, 'use speed.fp8 = false, or use adapter.kind = "full"$'),
        ({"optim.max_update_rms": 1.0}, 'leave out optim.max_update_rms, or use optim.name = "adamw8bit"$'),
        (
            {"train.gradient_checkpointing": "reentrant"},
            "write true, false or a list of block names.* always non-reentrant.*need$",
        ),
    ],
    ids=str,
)
def test_a_contradiction_names_the_pair_and_the_nearest_that_works(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of(settings)
