"""What the training tests share: a small set of pairs, its cache, and a config over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mapo_fast.data.prepare import prepare
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config

COLOURS = ("red", "green", "blue")


def make_pairs(folder: Path, count: int = 24, side: int = 32, *, labelled: bool = False) -> Path:
    """A `pairs.jsonl` folder of noisy coloured squares; chosen is brighter than rejected.

    With soft labels from 0.6 on, if wanted.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for index in range(count):
        names = {}
        for half, brightness in (("chosen", 200), ("rejected", 60)):
            pixels = random.integers(0, 50, (side, side, 3))
            pixels[..., index % 3] += brightness
            names[half] = f"{index:03d}-{half}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / names[half])
        label = {"label": 0.6 + 0.4 * index / count} if labelled else {}
        lines.append(json.dumps({"prompt": f"{COLOURS[index % 3]} square {index}", **names, **label}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_images(folder: Path, count: int = 24) -> Path:
    """`make_pairs`, taken apart: bright images are wanted, dark ones are not."""
    make_pairs(folder, count)
    lines = []
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        for half, label in (("chosen", True), ("rejected", 0)):
            if half == "chosen" or len(lines) % 3:  # not as many of both
                lines.append(json.dumps({"prompt": row["prompt"], "image": row[half], "label": label}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(model: Path, cache: Path, output: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A nested dict of settings for a short fp32 run, as a TOML file would hold it."""
    table: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"cache": str(cache), "resolution": 32, "bucket_step": 32, "held_out": 0.2, "flip": True},
        "train": {
            "output": str(output),
            "steps": 6,
            "pairs_per_batch": 2,
            "precision": "fp32",
            "log_every": 2,
            "checkpoint_every": 2,
            "evaluate_every": 0,
            "evaluate_pairs": 1,
            "caption_dropout": 0.2,
            "threads": 1,
        },
        "adapter": {"kind": "full"},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
    }
    for name, values in sections.items():
        table[name] = {**table.get(name, {}), **values}
    train = table["train"]
    if "offload" not in sections and not train.keys() & {"layout", "vram", "shard", "device"}:
        train.setdefault("gradient_checkpointing", False)  # recomputing takes a third of a run's time
    return table


def make_config(model: Path, cache: Path, output: Path, /, **sections: dict[str, Any]) -> Config:
    """`settings`, validated."""
    return parse_config(settings(model, cache, output, **sections))


def make_cache(
    model: Path, folder: Path, *, labelled: bool = False, paired: bool = True, held_out: float = 0.2
) -> Path:
    """Pairs, or single images, and their cache under `folder`; returns the cache."""
    source = make_pairs(folder / "pairs", labelled=labelled) if paired else make_images(folder / "images")
    data = {"source": str(source), "held_out": held_out}
    prepare(make_config(model, folder / "cache", folder / "unused", data=data))
    return folder / "cache"
