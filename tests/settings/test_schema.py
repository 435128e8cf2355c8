"""A config that contradicts itself cannot be made, in whatever way."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mapo_fast.settings.load import parse_config, with_settings
from mapo_fast.settings.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OffloadConfig,
    TrainConfig,
)
from mapo_fast.util.errors import UserError

TABLE: dict[str, dict[str, Any]] = {"model": {"path": "m"}, "data": {"cache": "c"}, "train": {"output": "o"}}


def made(**train: Any) -> Config:
    """By the constructor."""
    return Config(
        model=ModelConfig(path=Path("m")),
        data=DataConfig(cache=Path("c")),
        train=TrainConfig(output=Path("o"), **train),
    )


SPLIT = {"layout": "split", "gradient_checkpointing": False}
WAYS: dict[str, Callable[[], Any]] = {
    "constructor": lambda: made(**SPLIT),
    "model_validate": lambda: Config.model_validate({**TABLE, "train": {"output": "o", **SPLIT}}),
    "model_validate_json": lambda: Config.model_validate_json(
        json.dumps({**TABLE, "train": {"output": "o", **SPLIT}})
    ),
    "parse_config": lambda: parse_config({**TABLE, "train": {"output": "o", **SPLIT}}),
    "model_copy": lambda: made().model_copy(update={"train": made().train.model_copy(update=SPLIT)}),
    "model_copy of a table": lambda: made().model_copy(update={"train": {"output": "o", **SPLIT}}),
    "with_settings": lambda: with_settings(made(layout="split"), {"train.gradient_checkpointing": False}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_contradiction_is_refused_however_it_is_made(way: str) -> None:
    with pytest.raises((ValidationError, UserError), match=r"'split' works inside checkpointed blocks"):
        WAYS[way]()


def test_values_out_of_range_cannot_be_copied_in() -> None:
    config = made()
    unchecked = TrainConfig.model_construct(output=Path("o"), steps=0)
    for section in ({"output": "o", "steps": 0}, unchecked):
        with pytest.raises(UserError, match=r"train\.steps = 0: .*greater than or equal to 1"):
            config.model_copy(update={"train": section})
    with pytest.raises(ValidationError, match=r"steps\n.*greater than or equal to 1"):
        config.train.model_copy(update={"steps": 0})
    with pytest.raises(ValidationError, match=r"stps\n.*not permitted"):
        config.train.model_copy(update={"stps": 1})


def test_the_constructor_completes_as_a_file_does() -> None:
    config = made(gradient_checkpointing=False)
    assert config == parse_config({**TABLE, "train": {"output": "o", "gradient_checkpointing": False}})
    assert config.train.layout == "joint"
    assert config.stated == {"model.path", "data.cache", "train.output", "train.gradient_checkpointing"}
    train = TrainConfig(output=Path("o"))
    adapter, offload = AdapterConfig(kind="full"), OffloadConfig(weights="cpu")
    config = Config(model=config.model, data=config.data, train=train, adapter=adapter, offload=offload)
    assert config.train.fused_step
    assert config.offload.optimizer == "cpu"
    assert config.stated.isdisjoint({"train.fused_step", "offload.optimizer"})
    assert not train.fused_step  # what was handed in is as it was


def test_a_copy_drops_what_was_completed_and_keeps_what_is_stated() -> None:
    config = made(gradient_checkpointing=False, steps=7)
    copy = config.model_copy(
        update={"train": config.train.model_copy(update={"gradient_checkpointing": True})}
    )
    assert copy.train.layout == "split"
    assert copy.train.steps == 7
    assert copy.stated == config.stated
    assert config.model_copy() == config == config.model_copy(deep=True) == pickle.loads(pickle.dumps(config))


def test_an_objectives_own_settings_are_kept_in_a_copy() -> None:
    objective = ObjectiveConfig(name="dpo", beta=3.0)
    config = made().model_copy(update={"objective": objective})
    assert config.objective.settings == objective.settings == {"beta": 3.0}
    assert {"objective.name", "objective.beta"} <= config.stated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train.accumulation": 2},
            r"train\.accumulation = 2 .*one micro-batch.*use speed\.cuda_graph = false",
        ),
        ({"optim.name": "adafactor"}, r'reads numbers on the host.*use optim\.name = "adamw"$'),
        ({"train.precision": "fp16"}, r"scaler of fp16.*use speed\.cuda_graph = false"),
        ({"train.attention": "flash", "train.precision": "fp32"}, r'use train\.attention = "sdpa"'),
        ({"data.resolution": 32}, r"^plan: data\.bucket_step = 64 is larger than data\.resolution = 32: set"),
        ({"train.vram": "0GiB"}, r"^plan: train\.vram = '0GiB' is not a size: .*\"24GiB\"$"),
    ],
    ids=str,
)
def test_what_the_settings_alone_rule_out_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_settings(made(), {"speed.cuda_graph": True, **settings})
    assert "\n" not in str(caught.value)
