"""Find prompts that are equal to the text encoders: both tokenizers turn them into the same tokens.

Case, white space, Unicode forms and what lies beyond `data.max_tokens` make no difference to a model. Prompts
that differ in nothing else count as one everywhere: they are encoded once, and cannot be on both sides of
the held-out split.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from itertools import islice

from mapo_fast.data.scan import content_hash
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH
from mapo_fast.models.text import text_ids

_AT_ONCE = 4096

EMPTY = content_hash(b"prompt\0")
"""Key of the empty prompt; a pair's prompt is never empty."""


def spelling_key(prompt: str) -> bytes:
    """Key of a prompt as it is written, under which its embeddings may be stored."""
    return content_hash(b"prompt\0" + prompt.encode())


def prompt_keys(folder: Pipeline, prompts: Iterable[str], max_tokens: int) -> dict[str, bytes]:
    """The key of every distinct prompt: the least `spelling_key` of those with the same tokens.

    Where no two spellings of a prompt occur, that is its `spelling_key`.

    Raises:
        UserError: a tokenizer cannot be loaded.
    """
    tokenizers = [folder.load_tokenizer(which) for which in BOTH]
    tokens: dict[str, bytes] = {}
    least: dict[bytes, bytes] = {}
    distinct = iter(dict.fromkeys(prompts))
    while part := list(islice(distinct, _AT_ONCE)):
        ids = [text_ids(tokenizer, part, max_tokens) for tokenizer in tokenizers]
        for prompt, *seen in zip(part, *ids, strict=True):
            same = hashlib.sha256(b"".join(array("q", [len(i), *i]).tobytes() for i in seen)).digest()[:16]
            tokens[prompt], key = same, spelling_key(prompt)
            least[same] = min(key, least.get(same, key))
    return {prompt: least[same] for prompt, same in tokens.items()}
