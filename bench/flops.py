"""Arithmetic of a training step, counted, and the rate at which a device multiplies matrices, measured."""

from __future__ import annotations

import functools
import json
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.providers.task import Task, adapt
from bench.sdxl import make_fake
from mapo_fast.engine.step import predict
from mapo_fast.planner.trace import pairs_of_zeros
from mapo_fast.settings.schema import ObjectiveConfig

SIDES = {"cuda": 8192, "cpu": 1024}
"""Sides of the matrices whose product is timed."""


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


_ON_CPU = {  # which the counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def model_flops(task: Task, objective: str) -> float:
    """Operations of a step of the plain UNet, without recomputation; a multiply-add counts as two.

    A reference is another forward pass.
    """
    forward, backward = _count(json.dumps(task.unet_config), task.kind, task.side)
    forwards = 2 if ObjectiveConfig(name=objective).known.reference else 1
    return task.pairs * (forward * forwards + backward)


@functools.cache
def _count(unet_config: str, kind: str, side: int) -> tuple[int, int]:
    """Operations of one pair's forward and backward pass."""
    settings = json.loads(unet_config)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(settings)
    if kind == "lora":
        adapt(unet, torch.float32)
    mode = FakeTensorMode()
    make_fake(unet.train(), mode)
    with mode, FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        loss = predict(unet, pairs_of_zeros(1, side, settings)).sum()
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops() - forward


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of the fastest of several large products, in the type that UNets compute in."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * side**3 / (time.perf_counter() - begin))
    return best
