"""Model files of real size without weights: real keys, shapes and types over a hole in the file system."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mapo_fast.models.recognise import IGNORED
from mapo_fast.util.tensorheader import BITS

Keys = dict[str, tuple[str, tuple[int, ...]]]
"""Tensors of a file: type and shape by key."""


def hollow(path: Path, keys: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A safetensors file with these keys that takes no space on the disk; reads as zeros."""
    header: dict[str, Any] = {}
    offset = 0
    for key, (dtype, shape) in keys.items():
        end = offset + math.prod(shape) * BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


def listed() -> dict[str, tuple[int, ...]]:
    """All keys of SDXL's single files with their shapes, as sd-mecha lists them."""
    folder = resources.files("sd_mecha.extensions.builtin") / "model_configs"
    components = yaml.safe_load((folder / "sdxl-sgm.yaml").read_text())["components"]
    return {
        key: tuple(entry["shape"])
        for part in components.values()
        for key, entry in part.items()
        if "shape" in entry
    }


def sdxl_keys() -> Keys:
    """Keys that every model has, in fp16."""
    return {
        key: ("F16", shape)
        for key, shape in listed().items()
        if not key.startswith("edm") and not IGNORED.fullmatch(key)
    }
