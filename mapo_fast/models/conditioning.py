"""Embeddings that an image is sampled from: its whole prompt, of any length, and its negative or empty one.

Text is cut into chunks of 75 tokens. Each chunk gets a start token, an end token and padding to 77 of its
own and is encoded alone; hidden states are concatenated along the sequence, the pooled embedding is the first
chunk's. Of a prompt and its negative one, the shorter gets empty chunks, so that both are equally long.

The unconditional prompt is the negative one where there is a text. Otherwise it is zeros, as SDXL's own
pipeline config says and A1111 does, or the encoding of "" in all chunks, as ComfyUI does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH, CHUNK_TOKENS
from mapo_fast.models.text import PromptEmbeds, TextEncoder, token_counts

UNCONDITIONAL = ("zeros", "empty")


class Conditioning(NamedTuple):
    """One image's embeddings, each (1, S, D) and (1, P)."""

    prompt: PromptEmbeds
    unconditional: PromptEmbeds


def conditionings(
    folder: Pipeline,
    prompts: Sequence[str],
    *,
    negative: str = "",
    unconditional: str = "zeros",
    device: torch.device | str,
    dtype: torch.dtype,
) -> list[Conditioning]:
    """Embeddings of each prompt, on the CPU; the encoders run on `device`, one after the other.

    Texts are encoded one at a time: an embedding does not depend on which other prompts there are.

    Args:
        folder: the model.
        prompts: texts.
        negative: the negative prompt of all.
        unconditional: one of `UNCONDITIONAL`, for an empty negative prompt.
        device: to encode on.
        dtype: of encoders and embeddings.

    Raises:
        UserError: the encoders cannot be loaded.
    """
    zeros = not negative and unconditional == "zeros"
    *lengths, of_negative = token_counts(folder, [*prompts, negative])
    chunks = [max(1, -(-max(length, of_negative) // CHUNK_TOKENS)) for length in lengths]
    asked = list(zip(prompts, chunks, strict=True))
    wanted = {*asked} | (set() if zeros else {(negative, count) for count in chunks})
    hidden: dict[tuple[str, int], list[Tensor]] = {job: [] for job in sorted(wanted)}
    pooled: dict[tuple[str, int], Tensor] = {}
    for which in BOTH:
        encoder = TextEncoder(folder, which, 1, device, dtype)
        for job in hidden:
            text, encoder.chunks = job
            states, pooled[job] = encoder([text])
            hidden[job].append(states)
        encoder.free()
    found = {job: PromptEmbeds(torch.cat(states, dim=-1), pooled[job]) for job, states in hidden.items()}
    nothing = {  # by the number of chunks
        count: PromptEmbeds(*map(torch.zeros_like, found[text, count])) if zeros else found[negative, count]
        for text, count in asked
    }
    return [Conditioning(found[job], nothing[job[1]]) for job in asked]
