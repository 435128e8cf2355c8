"""Peak memory of one training step of the full SDXL, predicted without a GPU and without weights.

    python -m bench.predict_memory      prints the rows and writes bench/results/predicted_memory.jsonl

The trainer's own UNet set-up (adapter, precision, pair layout) and loss run two micro-batches on fake
tensors, the second beside the gradients of the first as under gradient accumulation; live bytes are counted
by storage, rounded to 512 B. Not included: CUDA context, library workspaces, fragmentation.
The optimizer's 8-bit states are added by count: 2 B per parameter plus the block maxima.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from bench.environment import environment
from bench.live_memory import LiveMemory
from bench.sdxl import PARAMETERS, SDXL_UNET
from mapo_fast import MaPOLoss
from mapo_fast.config import parse_config
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.precision import choose_precision
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.lora import add_lora

RESULTS = Path(__file__).parent / "results" / "predicted_memory.jsonl"
CPU = torch.device("cpu")  # fake tensors claim the CPU: claiming CUDA aborts on a CPU build of torch

ROWS: list[dict[str, str]] = [
    {"kind": "lora", "precision": "bf16", "layout": "split", "optimizer": "adamw8bit"},
    {"kind": "lora", "precision": "bf16", "layout": "joint", "optimizer": "adamw8bit"},
    {"kind": "full", "precision": "bf16", "layout": "split", "optimizer": "adamw8bit"},
    {"kind": "full", "precision": "bf16", "layout": "joint", "optimizer": "adamw8bit"},
    {"kind": "full", "precision": "pure_bf16", "layout": "split", "optimizer": "adamw8bit"},
]


def trace(row: dict[str, str], side: int = 128) -> dict[str, Any]:
    """Peak GiB of two micro-batches of one pair, latents (4, side, side), gradients accumulated."""
    config = parse_config(
        {
            "model": {"path": "sdxl"},
            "data": {"cache": "cache"},
            "train": {"output": "out", "precision": row["precision"], "layout": row["layout"]},
            "adapter": {"kind": row["kind"]},
        }
    )
    precision = choose_precision(config, CPU)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**SDXL_UNET).to(precision.base)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS
    mode = FakeTensorMode()
    if row["kind"] == "lora":
        adapter = config.adapter
        add_lora(
            unet,
            rank=adapter.rank,
            alpha=float(adapter.rank),
            targets=adapter.targets,
            seed=0,
            dtype=precision.trainable,
        )
    make_fake(unet, mode)
    unet.train()
    apply_layout(unet, config.train.layout, gradient_checkpointing=True)
    trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    with mode:
        inputs = fake_pair(side)
        with _cuda_norms(precision.autocast is not None), LiveMemory(unet.parameters()) as memory:
            parameters = memory.live
            saved = []
            for _ in range(2):
                before = memory.live
                with precision.context(CPU):
                    prediction = predict(unet, inputs)
                loss = MaPOLoss()(prediction, inputs.target).loss
                del prediction
                saved.append(memory.live - before)
                loss.backward()
                del loss
    states = trainable * 2 + trainable // 256 * 2 * 4
    return {
        **row,
        "latent_side": side,
        "trainable_parameters": trainable,
        "parameters_gib": round(parameters / 2**30, 2),
        "saved_gib": round(saved[0] / 2**30, 2),
        "forward_backward_peak_gib": round(memory.peak / 2**30, 2),
        "optimizer_states_gib": round(states / 2**30, 2),
        "peak_gib": round((memory.peak + states) / 2**30, 2),
        "kind_of_figure": "predicted",
    }


def fake_pair(side: int) -> PairInputs:
    """What SDXL's UNet is given for one pair of latents (4, side, side)."""
    return PairInputs(
        noisy=torch.zeros(2, 4, side, side),
        timesteps=torch.zeros(2, dtype=torch.int64),
        prompt_embeds=torch.zeros(2, 77, 2048),
        pooled_embeds=torch.zeros(2, 1280),
        time_ids=torch.zeros(2, 6),
        target=torch.zeros(2, 4, side, side),
    )


def make_fake(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta parameters and buffers by fake tensors that claim the CPU."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fake = FakeTensor(mode, parameter.detach().to("meta"), CPU)
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = FakeTensor(mode, buffer.detach().to("meta"), CPU)


@contextmanager
def _cuda_norms(autocast: bool) -> Iterator[None]:
    """CUDA's autocast runs norms in fp32, the CPU's does not: do as CUDA does."""
    if not autocast:
        yield
        return
    layer_norm, group_norm = F.layer_norm, F.group_norm

    def layer(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer_norm(x.float(), *args, **kwargs)

    def group(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return group_norm(x.float(), *args, **kwargs)

    with mock.patch.object(F, "layer_norm", layer), mock.patch.object(F, "group_norm", group):
        yield


def main() -> None:
    """Trace all rows, print them and write the results file."""
    stamp = environment()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", encoding="utf-8") as file:
        for row in ROWS:
            figures = trace(row)
            print(json.dumps(figures))
            file.write(json.dumps({**figures, "environment": stamp}) + "\n")


if __name__ == "__main__":
    main()
