"""Optimizer states: saved, restored in fresh objects, continued bit for bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapo_fast.engine.optim_state import flatten_optimizer_state, restore_optimizer_state
from mapo_fast.engine.optimizers import Adafactor, AdamW, AdamW8bit
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-2}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: AdamW(p, fused=True, **SETTINGS),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True, **SETTINGS),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, **SETTINGS),
    "adamw8bit": lambda p: AdamW8bit(p, seed=3, **SETTINGS),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=1e-2),
}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """8-bit states need at least 4096 elements; smaller tensors keep fp32 ones, and one is never used."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((80, 64), (16, 8, 9, 9), (13,), (4,))
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    made[1].data = made[1].data.to(memory_format=torch.channels_last)
    return made


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for weight in weights[:3]:
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = torch.empty_like(weight).copy_(gradient)  # in the parameter's layout, as autograd's
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def groups(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0, "lr": 3e-3}]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    train(OPTIMIZERS[name](groups(straight)), straight, range(7))

    first = parameters(dtype)
    optimizer = OPTIMIZERS[name](groups(first))
    train(optimizer, first, range(3))
    tensors, description = flatten_optimizer_state(optimizer)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, {"model": dict(zip("abcd", first, strict=True)), "optimizer": tensors}, {"o": description})

    second = parameters(dtype)
    for weight in second:  # contiguous, as a freshly loaded model's
        # Adafactor sums a tensor in memory order, so that other orders round otherwise.
        order = torch.preserve_format if name == "adafactor" else torch.contiguous_format
        weight.data = torch.zeros_like(weight, memory_format=order)
    saved = store.newest()
    assert saved is not None
    saved.copy_into("model", dict(zip("abcd", second, strict=True)))
    resumed = OPTIMIZERS[name](groups(second))
    restore_optimizer_state(resumed, saved.views("optimizer"), saved.state["o"])
    train(resumed, second, range(3, 7))

    for expected, found in zip(straight, second, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_is_the_same_and_shares_nothing(name: str) -> None:
    weights = parameters(torch.float32)
    optimizer = OPTIMIZERS[name](groups(weights))
    train(optimizer, weights, range(2))
    tensors, description = flatten_optimizer_state(optimizer)
    fresh = OPTIMIZERS[name](groups(weights))
    restore_optimizer_state(fresh, tensors.items(), json.loads(json.dumps(description)))
    assert weights[3] not in fresh.state
    for weight in weights[:3]:
        assert fresh.state[weight].keys() == optimizer.state[weight].keys()
        for key, value in optimizer.state[weight].items():
            found = fresh.state[weight][key]
            if isinstance(value, Tensor):
                assert found.dtype == value.dtype
                assert found.stride() == value.stride()
                assert torch.equal(found, value)
                assert found.data_ptr() != value.data_ptr()
            else:
                assert found == value
                assert type(found) is type(value)
    for group, expected in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in expected.items() if k != "params"
        }


@pytest.mark.parametrize("name", ["fused", "adamw8bit", "adafactor"])
def test_the_initial_state_is_the_first_steps(name: str) -> None:
    """Names, types, shapes, strides and places, and the step from it."""
    weights, prepared = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, given = OPTIMIZERS[name](weights), OPTIMIZERS[name](prepared)
    for p in prepared:
        given.state[p].update(given.initial_state(p))
    made = given.state[prepared[1]].copy()
    train(optimizer, weights, range(1))
    for key, value in optimizer.state[weights[1]].items():
        assert (value.dtype, value.shape, value.stride()) == (
            made[key].dtype,
            made[key].shape,
            made[key].stride(),
        )
    train(given, prepared, range(1))
    for p, q in zip(weights[:3], prepared, strict=False):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == given.state[q].keys()
        assert all(torch.equal(value, given.state[q][key]) for key, value in optimizer.state[p].items())


def test_shared_code_books_are_stored_once() -> None:
    weights = parameters(torch.float32)
    optimizer = OPTIMIZERS["adamw8bit"](weights)
    train(optimizer, weights, range(1))
    tensors, description = flatten_optimizer_state(optimizer)
    assert description["aliases"] == {"1.qmap1": "0.qmap1", "1.qmap2": "0.qmap2"}
    assert "1.qmap1" not in tensors
    fresh = OPTIMIZERS["adamw8bit"](weights)
    restore_optimizer_state(fresh, tensors.items(), description)
    assert fresh.state[weights[1]]["qmap1"] is fresh.state[weights[0]]["qmap1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_bitsandbytes_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    """Its class has the same name, its states the same layout; only stochastic rounding is new."""
    straight, weights = parameters(dtype), parameters(dtype)
    for group in (straight, weights):
        group[1].data = group[1].data.contiguous()
    train(bitsandbytes.optim.AdamW8bit(groups(straight), **SETTINGS), straight, range(5))
    optimizer = bitsandbytes.optim.AdamW8bit(groups(weights), **SETTINGS)
    train(optimizer, weights, range(3))
    tensors, description = flatten_optimizer_state(optimizer)
    resumed = AdamW8bit(groups(weights), stochastic_rounding=False, **SETTINGS)
    restore_optimizer_state(resumed, tensors.items(), json.loads(json.dumps(description)))
    train(resumed, weights, range(3, 5))
    for expected, found in zip(straight, weights, strict=True):
        assert torch.equal(expected, found)


def test_the_new_optimizer_keeps_its_own_implementation() -> None:
    weights = parameters(torch.float32)
    optimizer = OPTIMIZERS["foreach"](weights)
    train(optimizer, weights, range(1))
    fresh = OPTIMIZERS["fused"](weights)
    tensors, description = flatten_optimizer_state(optimizer)
    restore_optimizer_state(fresh, tensors.items(), description)
    assert fresh.param_groups[0]["fused"] is True
    train(fresh, weights, range(1, 2))


def test_another_optimizer_is_refused() -> None:
    weights = parameters(torch.float32)
    optimizer = OPTIMIZERS["fused"](weights)
    train(optimizer, weights, range(1))
    tensors, description = flatten_optimizer_state(optimizer)
    with pytest.raises(UserError, match=r"made with AdamW, optim\.name gives AdamW8bit"):
        restore_optimizer_state(OPTIMIZERS["adamw8bit"](weights), tensors.items(), description)


def test_a_removed_optimizer_says_what_to_do() -> None:
    weights = parameters(torch.float32)
    optimizer = OPTIMIZERS["adamw8bit"](weights)
    train(optimizer, weights, range(1))
    tensors, description = flatten_optimizer_state(optimizer)
    with pytest.raises(
        UserError, match=r"'paged_adamw8bit', and it was removed.*offload\.optimizer = 'cpu'"
    ) as e:
        restore_optimizer_state(optimizer, tensors.items(), {**description, "class": "PagedAdamW8bit"})
    assert "\n" not in str(e.value)


def test_other_parameters_are_refused() -> None:
    weights = parameters(torch.float32)
    optimizer = OPTIMIZERS["fused"](weights)
    train(optimizer, weights, range(1))
    tensors, description = flatten_optimizer_state(optimizer)
    with pytest.raises(UserError, match="for 4 tensors that are not the 3 trained here"):
        restore_optimizer_state(OPTIMIZERS["fused"](weights[:3]), tensors.items(), description)
