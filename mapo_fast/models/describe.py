"""A model in a few lines, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from mapo_fast.models.open import open_sdxl, prediction_of
from mapo_fast.models.sdxl import BOTH


def describe(path: Path) -> list[tuple[str, str]]:
    """Lines of label and text that describe a model's folder or file.

    Raises:
        UserError: it is not a model that can be trained; the message says what it is.
    """
    model = open_sdxl(path)
    kind = "a diffusers pipeline folder" if path.is_dir() else "a single file"
    lines = [("model", f"{path}: SDXL in {kind}"), ("predicts", prediction_of(model))]
    for name, part in model.parts.items():
        types = Counter[str]()
        for stored in part.stored.values():
            types[stored.dtype] += math.prod(stored.shape)
        shown = ", ".join(f"{count / 1e6:,.1f} M in {dtype}" for dtype, count in types.most_common())
        lines.append((name, f"{shown} ({part.where})"))
    lines.append(("tokenizers", " and ".join(dict.fromkeys(model.tokenizers.where(which) for which in BOTH))))
    return lines + [("note", remark) for remark in model.remarks]
