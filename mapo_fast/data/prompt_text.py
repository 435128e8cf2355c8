"""Turn other programs' notations in a prompt into plain text, with one warning for each kind.

| written                                  | becomes                                                     |
|------------------------------------------|-------------------------------------------------------------|
| `<lora:…>`, `<lyco:…>`, `<hypernet:…>`   | nothing: LoRAs are named for all prompts at once            |
| `(x:1.2)`                                | `x`: weights of words are not applied                       |
| `BREAK`                                  | a space: chunks are cut every 75 tokens and nowhere else    |
| `\\(`, `\\)`                               | `(`, `)`: their meaning without weights                     |

All other brackets stay as they are. Line breaks and runs of spaces become one space, as CLIP reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
_WEIGHT = re.compile(r"(?<!\\)\(([^()\\]*(?:\\.[^()\\]*)*):\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*(?<!\\)\)")
_BREAK = re.compile(r"\bBREAK\b")
_DEEPEST = 16
"""Most levels of nested weights that are resolved."""


def plain(prompt: str) -> tuple[str, frozenset[str]]:
    """A prompt as it is encoded, and which kinds of notation it had: keys of `_SAID`."""
    found = set()
    text, count = _NETWORK.subn("", prompt)
    if count:
        found.add("lora")
    for _ in range(_DEEPEST):
        text, count = _WEIGHT.subn(r"\1", text)
        if not count:
            break
        found.add("weight")
    text, count = _BREAK.subn(" ", text)
    if count:
        found.add("break")
    text = text.replace("\\(", "(").replace("\\)", ")")
    return " ".join(text.split()), frozenset(found)


_SAID = {
    "lora": "<lora:…> in {prompts} is left out: name LoRAs with --lora FILE=WEIGHT, for all prompts",
    "weight": "weights as in (word:1.2) in {prompts} are not applied: the words are kept",
    "break": "BREAK in {prompts} is left out: prompts are cut every 75 tokens",
}


def remarks(kinds: Sequence[frozenset[str]], name: str | None = None) -> Iterator[str]:
    """One warning for each kind of notation that prompts had.

    Args:
        kinds: what `plain` says of each prompt.
        name: of the prompts; by default their number.
    """
    for kind, said in _SAID.items():
        count = sum(kind in one for one in kinds)
        if count:
            yield said.format(prompts=name or ("1 prompt" if count == 1 else f"{count} prompts"))
