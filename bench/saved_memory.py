"""Memory that forward keeps for backward: per operator, per block (torch.compile too), for the whole UNet.

    python -m bench.saved_memory             prints the rows and writes bench/results/saved_memory.jsonl
    python -m bench.saved_memory --json      prints them as JSON lines, writes nothing

- `op`: every operator of `bench.cases` at SDXL's shapes, ours and PyTorch eager. Fake tensors.
- `block`: one plain block of SDXL in bf16, the same under `torch.compile`'s min-cut partitioner, and patched
  by `mapo_fast.patch_unet`. Real tensors on fewer positions than SDXL has; what is saved scales with them.
- `unet`: one pair at 1024² through the full UNet in bf16, no checkpointing, plain and patched. Fake tensors;
  live bytes after forward less those before, and the peak up to the end of backward with all gradients kept.

The bytes of parameters and inputs do not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases import BF16, Case, New, cases
from bench.dispatch import tensors
from bench.environment import environment
from bench.live_memory import LiveMemory
from bench.measure import saved_bytes
from bench.sdxl import CPU, fake_pair, make_fake
from mapo_fast import MaPOLoss, patch_unet
from mapo_fast.engine.step import predict
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.lora import add_lora

RESULTS = Path(__file__).parent / "results" / "saved_memory.jsonl"
MIB, GIB = 2**20, 2**30
WITHOUT_BACKWARD = ("adamw8bit", "add_rounded", "paired_noise")


def op_row(case: Case) -> dict[str, Any]:
    """Bytes that one operator keeps, ours and eager."""
    saved = {}
    for provider in ("ours", "eager"):
        with FakeTensorMode():
            inputs = case.inputs(New(CPU))
            call = case.providers[provider](*inputs)
            saved[f"{provider}_mib"] = round(saved_bytes(call, tensors(inputs)) / MIB, 2)
    op, shape, dtype = case.key
    return {"what": "op", "name": op, "shape": shape, "dtype": dtype, **saved}


# --- Blocks ---


def transformer_block(width: int, tokens: int) -> tuple[Any, tuple[Any, ...]]:
    """One BasicTransformerBlock of SDXL and its inputs, for one pair."""
    block = _first(width, "attentions").transformer_blocks[0]
    return block, (_draw(2, tokens, width), None, _draw(2, 77, 2048))


def resnet_block(width: int, side: int) -> tuple[Any, tuple[Any, ...]]:
    """One ResnetBlock2D of SDXL and its inputs, for one pair."""
    return _first(width, "resnets"), (_draw(2, width, side, side), _draw(2, 1280))


def _first(width: int, kind: str) -> Any:
    """The last of the UNet's first blocks of this width: it has as many channels in as out."""
    level = SDXL_UNET["block_out_channels"].index(width)
    return getattr(_shallow_unet().down_blocks[level], kind)[1].to_empty(device=CPU).to(BF16)


def _shallow_unet() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**{**SDXL_UNET, "transformer_layers_per_block": (1, 1, 1)})


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16)


BLOCKS: dict[str, tuple[str, Callable[[], tuple[Any, tuple[Any, ...]]]]] = {
    "BasicTransformerBlock, C = 640": ("2 × 32² tokens", lambda: transformer_block(640, 32 * 32)),
    "BasicTransformerBlock, C = 1280": ("2 × 16² tokens", lambda: transformer_block(1280, 16 * 16)),
    "ResnetBlock2D, C = 320": ("2 × 32²", lambda: resnet_block(320, 32)),
    "ResnetBlock2D, C = 640": ("2 × 16²", lambda: resnet_block(640, 16)),
}


def block_row(name: str) -> dict[str, Any]:
    """MiB that one block keeps: plain, plain under the partitioner, patched."""
    shape, make = BLOCKS[name]
    block, args = make()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    block.train()
    first = args[0].requires_grad_()
    besides = [first, *(a for a in args[1:] if a is not None), *block.parameters()]
    saved = {"plain": saved_bytes(lambda: block(*args), besides)}
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    compiled(*args)
    saved["plain_compiled"] = saved_bytes(lambda: compiled(*args), besides)
    holder = _shallow_unet()
    holder.block = block
    patch_unet(holder)
    besides += list(block.parameters())
    saved["patched"] = saved_bytes(lambda: block(*args), besides)
    figures = {f"{how}_mib": round(nbytes / MIB, 2) for how, nbytes in saved.items()}
    return {"what": "block", "name": name, "shape": shape, "dtype": "bf16", **figures}


# --- The whole UNet ---


def unet_row(kind: str, *, patched: bool, side: int = 128) -> dict[str, Any]:
    """GiB that one pair keeps in the full SDXL UNet, latents (4, side, side), no checkpointing."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**SDXL_UNET).to(BF16)
    if kind == "lora":
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        add_lora(unet, rank=16, alpha=16.0, targets=targets, seed=0, dtype=BF16)
    mode = FakeTensorMode()
    make_fake(unet, mode)
    unet.train()
    with mode:
        if patched:
            patch_unet(unet)
        inputs = fake_pair(side)
        with LiveMemory(unet.parameters()) as memory:
            parameters = memory.live
            prediction = predict(unet, inputs)
            loss = MaPOLoss()(prediction, inputs.target).loss
            del prediction
            saved = memory.live - parameters
            loss.backward()
    return {
        "what": "unet",
        "name": f"SDXL, {'LoRA r16' if kind == 'lora' else 'full'}, one pair",
        "patched": patched,
        "latent_side": side,
        "dtype": "bf16",
        "saved_gib": round(saved / GIB, 2),
        "peak_gib": round(memory.peak / GIB, 2),
    }


def rows() -> Iterator[dict[str, Any]]:
    for case in cases(use="count"):
        if case.headline and case.op not in WITHOUT_BACKWARD:
            yield op_row(case)
    for name in BLOCKS:
        yield block_row(name)
    for kind in ("full", "lora"):
        for patched in (False, True):
            yield unet_row(kind, patched=patched)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON lines, write nothing")
    only_print = parser.parse_args().json
    warnings.simplefilter("ignore")  # third-party deprecations
    logging.disable(logging.WARNING)
    stamp = environment()
    found = []
    for row in rows():
        print(json.dumps(row) if only_print else "  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        found.append({**row, "environment": stamp})
    if not only_print:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    main()
