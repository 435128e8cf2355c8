"""Whether a model is of use is judged by its weights and by input that is finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.optim import GuardedOptimizer
from mapo_fast.engine.optimizers import AdamW
from mapo_fast.engine.step import PairInputs
from mapo_fast.run.health import is_healthy, made_finite, mostly_skipped
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.tensorparts import all_finite
from tests.engine.pair_steps import pair_of_inputs
from tests.unets import make_unet


@pytest.fixture(scope="module")
def unet() -> Any:
    return make_unet("sdxl", dtype=torch.float32)


def inputs() -> PairInputs:
    return pair_of_inputs(1, torch.float32)


def test_bad_data_does_not_make_a_healthy_model_ill(unet: Any) -> None:
    bad = inputs()
    for tensor, value in zip(
        bad, (float("nan"), None, float("inf"), -float("inf"), None, float("nan")), strict=True
    ):
        if value is not None:
            tensor.view(-1)[0] = value
    weights = list(unet.parameters())
    assert not is_healthy(weights, unet, bad)
    assert is_healthy(weights, unet, made_finite(bad))
    assert is_healthy(weights, unet, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_weight_that_is_not_finite_is_enough(unet: Any, value: float) -> None:
    weights = {name: p.detach().clone() for name, p in unet.named_parameters()}
    weights["conv_in.bias"][1] = value
    assert not is_healthy(weights.values(), unet, inputs())
    assert not is_healthy(weights.values(), unet, None)


def test_finite_weights_that_predict_nothing_finite_are_found() -> None:
    """Or nothing whose square is: the error of such a prediction is infinite."""
    unet = make_unet("sdxl", dtype=torch.float32)
    with torch.no_grad():
        unet.conv_out.weight.fill_(1e30)
    assert all_finite(unet.parameters())
    assert not is_healthy(unet.parameters(), unet, inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_finite_in_every_dtype(dtype: torch.dtype) -> None:
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([largest, torch.zeros(0, dtype=dtype), torch.tensor([2**40])])
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([largest, torch.tensor([0.0, value], dtype=dtype)])


def test_half_of_the_steps_is_not_most_of_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = GuardedOptimizer(torch.optim.AdamW([weight]), [weight], max_grad_norm=0.0, scaler=None)
    optimizer.skipped.fill_(5)
    assert mostly_skipped(optimizer, 10, store) is None
    assert mostly_skipped(optimizer, 9, store) == (
        "5 of 9 steps were not finite and were skipped: there is no result, the checkpoint of step 9 is in "
        f"{tmp_path}; look for damaged data (train.max_skipped_steps counts steps in a row only)"
    )


def test_a_tensor_that_was_skipped_is_its_share_of_a_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = FusedStep(AdamW(weights, fused=True), weights, max_grad_norm=0.0)
    optimizer.skipped.fill_(2)
    optimizer.skipped_tensors.fill_(12)
    assert mostly_skipped(optimizer, 10, store) is None
    assert mostly_skipped(optimizer, 9, store) is not None
