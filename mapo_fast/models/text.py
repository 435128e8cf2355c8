"""Prompts through SDXL's two text encoders, exactly as diffusers' `StableDiffusionXLPipeline.encode_prompt`.

A prompt's embedding is the penultimate hidden state of both encoders, concatenated along the width; the
pooled embedding is the second encoder's. CLIP sees 77 positions: a start token, 75 tokens of text, an end
token, padding. `max_tokens = 150` or `225` lets a prompt have two or three such windows ("chunks"): each one
is encoded on its own with its own start and end token, and the results are concatenated along the sequence,
as common inference interfaces do for long prompts; the pooled embedding is the first chunk's. All prompts of
one setting have the same sequence length, 77 · chunks, because short prompts get empty chunks.

Only one encoder is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH, CHUNK_TOKENS, CONTEXT, Which, encode_text

BATCH = 16


class PromptEmbeds(NamedTuple):
    """Embeddings of N prompts on the CPU."""

    prompt_embeds: Tensor  # (N, S, D), S = 77 · chunks, D = width of encoder 1 + width of encoder 2
    pooled_embeds: Tensor  # (N, P)


@dataclass(frozen=True)
class Truncation:
    """A prompt that is longer than its chunks."""

    prompt: str
    tokens: int
    kept: int
    cut: str


def chunk_count(max_tokens: int) -> int:
    """Windows of 75 text tokens that `max_tokens` = 77, 150, 225, … stands for."""
    return max_tokens // CHUNK_TOKENS


def encode_prompts(
    folder: Pipeline,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> PromptEmbeds:
    """Embeddings of `prompts` in `dtype`, on the CPU; the encoders run on `device`, one after the other.

    Prompts longer than `max_tokens` allows are truncated (see `truncations`).

    Raises:
        UserError: the encoders cannot be loaded.
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("encode_prompts needs at least one prompt")
    hidden: list[Tensor] = []
    pooled: list[Tensor] = []
    for which in BOTH:
        encoder = TextEncoder(folder, which, chunk_count(max_tokens), device, dtype)
        batches = [encoder(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        encoder.free()
        hidden.append(torch.cat([batch[0] for batch in batches]))
        pooled = [batch[1] for batch in batches]
    return PromptEmbeds(torch.cat(hidden, dim=-1), torch.cat(pooled))


def empty_prompt(
    folder: Pipeline, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
) -> PromptEmbeds:
    """Embeddings of "no prompt" (N = 1): zeros where the pipeline says so (SDXL's default), else ""."""
    if not folder.zeros_for_empty_prompt:
        return encode_prompts(folder, [""], max_tokens=max_tokens, device=device, dtype=dtype)
    widths, pooled = text_widths(folder)
    sequence = CONTEXT * chunk_count(max_tokens)
    return PromptEmbeds(
        torch.zeros(1, sequence, sum(widths), dtype=dtype), torch.zeros(1, pooled, dtype=dtype)
    )


def text_widths(folder: Pipeline) -> tuple[tuple[int, int], int]:
    """Hidden widths of the two encoders and the pooled width, read from their configs."""
    first, second = folder.text_config(1), folder.text_config(2)
    return (first.hidden_size, second.hidden_size), second.projection_dim


class TextEncoder:
    """One of the two encoders with its tokenizer, for as long as it is needed.

    Calling it with up to `BATCH` prompts gives hidden states (n, 77 · chunks, width) and, from encoder 2, the
    pooled embedding (n, P) of each first chunk (encoder 1 gives an empty tensor), both on the CPU.
    """

    def __init__(
        self,
        folder: Pipeline,
        which: Which,
        chunks: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.which, self.chunks, self.device = which, chunks, torch.device(device)
        self.tokenizer = folder.load_tokenizer(which)
        self.model: Any = folder.load_text_encoder(which, dtype).to(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode a batch of prompts."""
        ids = chunk_ids(self.tokenizer, prompts, self.chunks)  # (n, chunks, 77)
        hidden, pooled = [], torch.empty(0)
        for index in range(self.chunks):
            states, pool = encode_text(self.model, ids[:, index].to(self.device), self.which)
            hidden.append(states.cpu())
            if index == 0 and pool is not None:
                pooled = pool.cpu()
        return torch.cat(hidden, dim=1), pooled

    def free(self) -> None:
        """Drop the weights."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def chunk_ids(tokenizer: Any, prompts: Sequence[str], chunks: int) -> Tensor:  # (N, chunks, 77) int64
    """Token ids with start, end and padding in every chunk, text beyond the last chunk cut off."""
    rows = []
    for ids in _text_ids(tokenizer, prompts):
        row = []
        for index in range(chunks):
            piece = ids[index * CHUNK_TOKENS : (index + 1) * CHUNK_TOKENS]
            piece = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            row.append(piece + [tokenizer.pad_token_id] * (CONTEXT - len(piece)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), chunks, CONTEXT)


def text_ids(tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The tokens of each prompt that reach an encoder, without start, end and padding."""
    kept = CHUNK_TOKENS * chunk_count(max_tokens)
    return [ids[:kept] for ids in _text_ids(tokenizer, prompts)]


def token_counts(folder: Pipeline, prompts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, without start, end and padding; the first tokenizer decides."""
    return [len(ids) for ids in _text_ids(folder.load_tokenizer(1), prompts)]


def truncations(folder: Pipeline, prompts: Sequence[str], max_tokens: int) -> Iterator[Truncation]:
    """The prompts that are cut at `max_tokens`, in order; the first tokenizer decides."""
    tokenizer = folder.load_tokenizer(1)
    kept = CHUNK_TOKENS * chunk_count(max_tokens)
    for start in range(0, len(prompts), 256):
        part = prompts[start : start + 256]
        for prompt, ids in zip(part, _text_ids(tokenizer, part), strict=True):
            if len(ids) > kept:
                cut = str(tokenizer.decode(ids[kept:], skip_special_tokens=True))
                yield Truncation(prompt, len(ids), kept, cut)


def _text_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts:
        return []
    ids: list[list[int]] = tokenizer(
        list(prompts), add_special_tokens=False, truncation=False, padding=False, verbose=False
    ).input_ids
    return ids
