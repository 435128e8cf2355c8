"""Any three settings together take the steps of none: kind, optimizer, layout, offload of each part, …"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_fast import MaPOLoss
from mapo_fast.engine import offload_activations, stream_states, stream_weights
from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.precision import Precision
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from tests.covering import covering
from tests.engine.pair_steps import PAIRS, pair_of_inputs
from tests.unets import make_unet

FP64 = Precision(torch.float64, torch.float64, None, scaled=False)
CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")


def settings(
    kind: str = "full",
    optimizer: str = "adamw",
    layout: str = "joint",
    checkpointing: bool | tuple[str, ...] = False,
    fused: bool = False,
    states: str = "gpu",
    weights: str = "gpu",
    activations: str = "gpu",
) -> Config:
    return parse_config(
        {
            "model": {"path": "unused"},
            "data": {"cache": "unused"},
            "train": {
                "output": "unused",
                "precision": "fp32",
                "layout": layout,
                "gradient_checkpointing": checkpointing,
                "fused_step": fused,
            },
            "adapter": {"kind": kind, "rank": 4},
            # No global clip: fused, it is that of the step before, another arithmetic.
            "optim": {"name": optimizer, "lr": 1e-3, "max_grad_norm": 0.0},
            "offload": {"optimizer": states, "weights": weights, "activations": activations},
        }
    )


def combinations() -> list[Any]:
    """(kind, optimizer, config): of all that the config allows, those in which any two settings meet.

    Those in which any three meet run in `make proof`.
    """
    places = ("gpu", "cpu")
    rows, configs = [], []
    for kind, optimizer, *rest in product(
        ("full", "lora"),
        OPTIMIZERS,
        ("joint", "split", "sequential"),
        (False, True, ("up_blocks", "mid_block.attentions.0")),
        (False, True),
        places,
        places,
        places,
    ):
        if optimizer != "adamw" and rest[1] is not True:
            continue  # which blocks are checkpointed is nothing that an optimizer could notice
        if isinstance(rest[1], tuple) and "cpu" in rest[3:5]:
            continue  # nor something that states or weights could
        try:
            config = settings(kind, optimizer, *rest)  # type: ignore[arg-type]
        except UserError:
            continue
        rows.append((kind, optimizer, *rest))
        configs.append(config)
    pairs = covering(rows, strength=2)
    marked = [(i, ()) for i in pairs] + [(i, pytest.mark.proof) for i in covering(rows) if i not in pairs]
    return [pytest.param(*rows[i][:2], configs[i], marks=marks) for i, marks in marked]


COMBINATIONS = combinations()


def name(value: Any) -> str:
    if not isinstance(value, Config):
        return str(value)
    train, offload = value.train, value.offload
    checkpointing = {False: "plain", True: "checkpointed"}.get(train.gradient_checkpointing, "partly")  # type: ignore[call-overload]
    places = [where for where in ("optimizer", "weights", "activations") if getattr(offload, where) == "cpu"]
    return "-".join([train.layout, checkpointing, *(["fused"] if train.fused_step else []), *places])


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move also what is too small to be worth it."""
    monkeypatch.setattr(stream_weights, "STREAMED_BYTES", 1)
    monkeypatch.setattr(stream_states, "_SMALLEST", 1)
    monkeypatch.setattr(offload_activations, "OFFLOADED_BYTES", 1)


def trained(config: Config, steps: int = 2) -> dict[str, Tensor]:
    """The weights after some steps over three pairs."""
    parts = prepare_unet(make_unet("sdxl"), config, FP64, CPU)
    engine = Engine(config, parts, MaPOLoss(), FP64, CPU)
    start = {name: w.clone() for name, w in parts.state_dict().items()}
    for _ in range(steps):
        engine.start(1e-3)
        engine.accumulate(pair_of_inputs(PAIRS), 1.0)
        engine.finish()
    assert int(engine.optimizer.skipped) == 0
    parts.transfers.synchronize()
    found = {name: w.clone() for name, w in parts.state_dict().items()}
    moved = [n for n in found if not torch.equal(found[n], start[n])]
    assert len(moved) == len(engine.parameters)
    return found


TRUTH: dict[tuple[str, str], dict[str, Tensor]] = {}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer", "config"), COMBINATIONS, ids=name)
def test_all_plans_take_the_steps_of_joint(kind: str, optimizer: str, config: Config) -> None:
    if (kind, optimizer) not in TRUTH:
        TRUTH[kind, optimizer] = trained(settings(kind, optimizer))
    truth = TRUTH[kind, optimizer]
    found = trained(config)
    assert found.keys() == truth.keys()
    for tensor, expected in truth.items():
        error = (found[tensor] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= 1e-10, tensor
