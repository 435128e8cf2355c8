"""Prompts that are never voted on: the comparison at the end needs some that the model has not seen.

They are in the project's `kept.json` and stay the same. A tenth of the prompts is kept, at least `FEWEST` and
at most `MOST` of them, but never more than half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from mapo_fast.util.errors import UserError
from mapo_fast.util.files import read_json, write_json

FILE = "kept.json"
FEWEST, MOST = 10, 20


def kept_prompts(folder: Path, prompts: Collection[str], voted: Collection[str]) -> set[str]:
    """The prompts to keep: those in the file, and new ones where there are too few of them.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    path = folder / FILE
    kept: list[str] = []
    if path.exists():
        found = read_json(path).get("prompts")
        if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
            raise UserError(f"{path} is damaged: delete it, and other prompts are kept")
        kept = found
    voted = {*voted}
    here = [prompt for prompt in kept if prompt in prompts and prompt not in voted]
    want = min(MOST, max(FEWEST, len(prompts) // 10), len(prompts) // 2)
    if len(here) < want:
        open_ones = [prompt for prompt in prompts if prompt not in voted and prompt not in {*here}]
        kept += sorted(open_ones, key=_order)[: want - len(here)]
        write_json(path, {"prompts": kept})
    return {*kept} - voted


def _order(prompt: str) -> bytes:
    """As good as random, and the same on every machine."""
    return hashlib.sha256(b"kept\0" + prompt.encode()).digest()
