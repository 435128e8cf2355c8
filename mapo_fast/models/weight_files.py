"""The files of a component's weights: safetensors only, of one variant, whole or in pieces."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mapo_fast.util.errors import UserError
from mapo_fast.util.files import read_json


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a component's weights, of the variant that `_variant` chooses.

    Args:
        folder: the component's folder.
        stem: first part of the files' names.

    Raises:
        UserError: files are missing, or there are several variants.
    """
    variant = _variant(folder, stem)
    dotted = f".{variant}" if variant else ""
    single = folder / f"{stem}{dotted}.safetensors"
    index = folder / f"{stem}.safetensors.index{dotted}.json"
    if single.is_file():
        if os.path.lexists(index):  # diffusers would load what the index names, unchecked
            raise UserError(f"{folder} has both {single.name} and {index.name}: remove one of them")
        return [single]
    if os.path.lexists(single):
        raise UserError(f"{single} is no regular file, or a link to nothing: copy it from the model again")
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(_is_weights(name) for name in named.values()):
        raise UserError(
            f"{index} has no weight_map from tensors to names of .safetensors files: copy it "
            "from the model again"
        )
    names = sorted(set(named.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise UserError(f"{index} names missing weight files: {', '.join(missing) or 'none at all'}")
    return [folder / name for name in names]


_PREFERRED = (None, "fp16", "fp32", "bf16")
_SHARD = re.compile(r"-\d+-of-\d+\.")


def _variant(folder: Path, stem: str) -> str | None:
    """The variant to load: the plain one (None) where there is one, else the first of `_PREFERRED`, else the
    only one.
    """
    of_weights = re.compile(
        rf"{stem}(?:\.([\w.-]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([\w.-]+))?\.json"
    )
    names = [path.name for path in folder.iterdir() if not _SHARD.search(path.name)]
    found = {m[1] or m[2] for name in names if (m := of_weights.fullmatch(name))}
    for variant in _PREFERRED:
        if variant in found:
            return variant
    if len(found) == 1:
        return found.pop()
    if found:
        listed = ", ".join(sorted(str(name) for name in found))
        raise UserError(
            f"{folder} has the weights of several variants ({listed}) and none without a name: rename the "
            f"ones to use to {stem}.safetensors"
        )
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has only pickled .bin weights; convert them to safetensors (nothing is unpickled here)"
        )
    raise UserError(f"{folder} has no weights: {stem}.safetensors is missing")


def _is_weights(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
