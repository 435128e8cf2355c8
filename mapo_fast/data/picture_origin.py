"""What a generated picture says of itself: prompt, model, sampler, LoRAs and seed.

Of ComfyUI's graph a value counts only where all nodes that could have set it agree.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from mapo_fast.data.leak import MADE, Made
from mapo_fast.data.picture_graph import node_parts, nodes_of, samplers
from mapo_fast.data.picture_prompts import prompt_in
from mapo_fast.data.picture_texts import NoPromptError, a1111_fields, a1111_parts, picture_texts, texts_in

_LORA = re.compile(r"<lora:([^:>]{1,200})")
_LONGEST = 200


class Origin(NamedTuple):
    """What made a picture; a text is empty where the picture does not say."""

    prompt: str | None
    why: str
    """Why there is no prompt."""
    model: str = ""
    sampler: str = ""
    lora: str = ""
    """Names, sorted, with commas."""
    seed: str = ""


def origin(path: Path) -> Origin:
    """What a picture's file says of its making.

    Raises:
        MachineError: I/O failed.
    """
    try:
        texts = picture_texts(path)
    except NoPromptError as error:
        return Origin(None, str(error))
    try:
        prompt, why = prompt_in(texts), ""
    except NoPromptError as error:
        prompt, why = None, str(error)
    return Origin(prompt, why, **_facts(texts))


def made_with(data: bytes) -> Made:
    """What made the picture in a file's bytes."""
    try:
        facts = _facts(texts_in(io.BytesIO(data)))
    except NoPromptError:
        return Made()
    return Made(**{name: facts[name] for name in MADE if name in facts})


def _facts(texts: Mapping[str, str]) -> dict[str, str]:
    try:
        return {name: _clean(value) for name, value in _said(texts).items()}
    except NoPromptError:
        return {}


def _said(texts: Mapping[str, str]) -> dict[str, str]:
    if "parameters" in texts:
        parts = a1111_parts(texts["parameters"])
        fields = a1111_fields(parts.settings)
        return {
            "model": fields.get("Model", fields.get("Model hash", "")),
            "sampler": " ".join(filter(None, (fields.get("Sampler"), fields.get("Schedule type")))),
            "lora": _names(_LORA.findall(parts.prompt)),
            "seed": fields.get("Seed", ""),
        }
    nodes = nodes_of(texts.get("prompt", "null"))
    inputs = [inputs for _, inputs in map(node_parts, nodes.values())]
    sampling = [inputs for _, inputs in samplers(nodes)]
    return {
        "model": _one(one.get("ckpt_name", one.get("unet_name")) for one in inputs),
        "sampler": " ".join(
            filter(None, (_one(one.get(name) for one in sampling) for name in ("sampler_name", "scheduler")))
        ),
        "lora": _names(name for one in inputs if isinstance(name := one.get("lora_name"), str)),
        "seed": _one(one.get("seed", one.get("noise_seed")) for one in sampling),
    }


def _one(values: Iterable[object]) -> str:
    """The text or number that all agree on."""
    found = {str(value) for value in values if isinstance(value, str | int)}
    return found.pop() if len(found) == 1 else ""


def _names(files: Iterable[str]) -> str:
    return ", ".join(sorted({PureWindowsPath(file).name.removesuffix(".safetensors") for file in files}))


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:_LONGEST].strip()
