"""Prompts through both text encoders into shards: first all with encoder 1, then all with encoder 2.

Embeddings are kept in fp16, or in fp32 where a value does not fit into it. A prompt whose embeddings are not
finite counts as failed in its shard, and its pairs are skipped. An encoder that does not fit the GPU's free
memory runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress

import torch
from torch import Tensor

from mapo_fast.data import shards
from mapo_fast.data.prompts import EMPTY
from mapo_fast.data.shards import ShardFamily, pack_keys
from mapo_fast.hardware import gpu
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH, CONTEXT, Which, text_encoder
from mapo_fast.models.text import BATCH, TextEncoder, chunk_count, empty_prompt, text_widths
from mapo_fast.util.errors import UserError
from mapo_fast.util.progress import Callbacks, stage


def prompt_bytes(folder: Pipeline, max_tokens: int) -> int:
    """Bytes of a prompt's embeddings in the shards of both encoders."""
    (first, second), pooled = text_widths(folder)
    return 2 * (CONTEXT * chunk_count(max_tokens) * (first + second) + pooled)


def embed_prompts(
    prompts: Mapping[bytes, str],
    families: Mapping[str, ShardFamily],
    folder: Pipeline,
    *,
    max_tokens: int,
    device: torch.device,
    callbacks: Callbacks,
) -> None:
    """Encode the prompts, and the empty one, that the shards do not hold yet.

    Args:
        prompts: distinct prompts by key, in source order.
        families: `text1` and `text2`, which are written to.
        folder: the pipeline.
        max_tokens: `data.max_tokens`.
        device: where to encode, if it has the memory.
        callbacks: called with progress.

    Raises:
        UserError: an encoder cannot be loaded, or gives values for the empty prompt that are not finite.
    """
    prompts = {EMPTY: "", **prompts}
    for which in BOTH:
        family = families[f"text{which}"]
        if folder.zeros_for_empty_prompt and EMPTY not in family:
            _store_zeros(family, folder, which, max_tokens)
        todo = {key: prompt for key, prompt in prompts.items() if key not in family}
        if not todo:
            continue
        try:
            _embed(todo, family, folder, which, max_tokens, device, callbacks)
            continue
        except RuntimeError as error:  # the encoder's memory is freed with it
            if not gpu.is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        callbacks.message(f"text encoder {which} does not fit the GPU's free memory: on the CPU")
        todo = {key: prompt for key, prompt in todo.items() if key not in family}
        _embed(todo, family, folder, which, max_tokens, torch.device("cpu"), callbacks)


def _embed(
    prompts: Mapping[bytes, str],
    family: ShardFamily,
    folder: Pipeline,
    which: Which,
    max_tokens: int,
    device: torch.device,
    callbacks: Callbacks,
) -> None:
    """All prompts through one encoder, shard by shard."""
    rows = max(1, shards.SHARD_BYTES // prompt_bytes(folder, max_tokens))
    encoder = TextEncoder(folder, which, chunk_count(max_tokens), device, torch.float32)
    todo = list(prompts)
    with stage(callbacks, f"prompts, encoder {which}", len(todo)) as advance:
        for start in range(0, len(todo), rows):
            keys = todo[start : start + rows]
            hidden, pooled = [], []
            for i in range(0, len(keys), BATCH):
                out = encoder([prompts[key] for key in keys[i : i + BATCH]])
                if keys[i] == EMPTY and not (out[0][0].isfinite().all() and out[1][:1].isfinite().all()):
                    raise UserError(_damaged(folder, which))
                hidden.append(out[0])
                pooled.append(out[1])
                advance(len(out[0]))
            family.write(_tensors(keys, torch.cat(hidden), torch.cat(pooled), which))
    encoder.free()


def _store_zeros(family: ShardFamily, folder: Pipeline, which: Which, max_tokens: int) -> None:
    zeros = empty_prompt(folder, max_tokens=max_tokens, device="cpu", dtype=torch.float32)
    hidden = zeros.prompt_embeds[..., : text_widths(folder)[0][which - 1]]
    family.write(_tensors([EMPTY], hidden, zeros.pooled_embeds, which))


def _damaged(folder: Pipeline, which: Which) -> str:
    part = folder.where(text_encoder(which))
    return (
        f"{part} gives values for the empty prompt that are not finite: its weights are damaged; copy it "
        "from the model again"
    )


def _tensors(keys: list[bytes], hidden: Tensor, pooled: Tensor, which: int) -> dict[str, Tensor]:
    """A shard's contents: embeddings of prompts where they are finite, and the keys of the others."""
    values = {"hidden": hidden, "pooled": pooled} if which == 2 else {"hidden": hidden}
    good = torch.stack([value.isfinite().flatten(1).all(dim=1) for value in values.values()]).all(dim=0)
    tensors = {name: _half(value[good]) for name, value in values.items()} if good.any() else {}
    for name, found in (("keys", good), ("failed", ~good)):
        if found.any():
            tensors[name] = pack_keys(list(compress(keys, found.tolist())))
    return tensors


def _half(values: Tensor) -> Tensor:
    """The tensor in fp16, or unchanged where a value does not fit into fp16."""
    half = values.half()
    return half if half.isfinite().all() else values
